"""Backwards through a tree part by part (`partition`), relaying the gradients of keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from katcore.train.attention import KeyValue, TreeMask
from katcore.train.batch import TreeBatch
from katcore.train.partition import Part, plan
from katcore.train.policy import go_back, hidden

Ends = tuple[list[Tensor], list[Tensor]]
"""Tensors to go backwards from, and their gradients."""
Loss = Callable[[Any, Tensor], Ends]
"""From what the model says of a part, and the flat places of its tokens in the whole batch."""


class _Chain:
    """By layer, keys and values of a part, and the gradients that parts below have for them.

    These are added up in at least float32: in bfloat16 a sum stops growing at 256 times what is added.
    """

    def __init__(self) -> None:
        self._seen: dict[int, KeyValue] = {}
        self._grads: dict[int, KeyValue] = {}

    def keep(self, layer: int, own: KeyValue) -> None:
        """Take a layer's."""
        self._seen[layer] = own

    def leaves(self, layer: int, num: int) -> KeyValue:
        """Those of the first tokens as they are, without what they come from."""
        key, value = self._seen[layer]
        return _leaf(key, num), _leaf(value, num)

    def relay(self, layer: int, leaves: KeyValue) -> None:
        """Add the gradients for some leaves."""
        if layer not in self._grads:
            key, value = self._seen[layer]
            self._grads[layer] = _zeros(key), _zeros(value)
        for total, leaf in zip(self._grads[layer], leaves, strict=True):
            if leaf.grad is not None:
                total[:, :, : leaf.shape[2]] += leaf.grad

    @property
    def ends(self) -> Ends:
        """Where to go backwards from."""
        tensors = [tensor for layer in self._grads for tensor in self._seen[layer]]
        grads = [grad for pair in self._grads.values() for grad in pair]
        return tensors, [grad.to(tensor.dtype) for tensor, grad in zip(tensors, grads, strict=True)]


class _Past:
    """The path above a part: beginnings of chains, without copies. See `attention.Past`."""

    def __init__(self, path: Sequence[tuple[_Chain, int]], own: _Chain) -> None:
        self._path = path
        self._own = own
        self._leaves: dict[int, list[KeyValue]] = {}

    @property
    def lengths(self) -> list[int]:
        """How many tokens each stretch has."""
        return [num for _, num in self._path]

    def stretches(self, layer: int, own: KeyValue) -> list[KeyValue]:
        """Those above; the part's own are kept for the parts below it.

        A layer that is computed again on the way back gets what it got: the gradients come to those.
        """
        if layer not in self._leaves:
            self._own.keep(layer, own)
            self._leaves[layer] = [chain.leaves(layer, num) for chain, num in self._path]
        return self._leaves[layer]

    def relay(self) -> None:
        """Give the gradients to whom they belong."""
        for layer, stretches in self._leaves.items():
            for (chain, _), leaves in zip(self._path, stretches, strict=True):
                chain.relay(layer, leaves)


@dataclass(frozen=True, slots=True)
class _Walk:
    model: Any
    ids_T: Tensor
    depths_T: Tensor
    parents: Sequence[int]
    loss: Loss
    routes_PLK: Tensor | None
    options: dict[str, Any]

    def visit(self, part: Part, path: Sequence[tuple[_Chain, int]]) -> None:
        """Forwards through a part, both ways through those below it, and back."""
        chain = _Chain()
        past = _Past(path, chain)
        at_T = torch.tensor(part.tokens)
        found = hidden(
            self.model,
            self.ids_T[None, at_T],
            self.depths_T[None, at_T],
            TreeMask(self._parents(part), past),
            routes_PLK=None if self.routes_PLK is None else self.routes_PLK[at_T],
            **self.options,
        )
        tensors, grads = self.loss(found, at_T)
        for below in part.parts:
            self.visit(below, [*path, (chain, len(below.path) - len(part.path))])
        more = chain.ends
        go_back(self.model, found, tensors + more[0], grads + more[1])
        past.relay()

    def _parents(self, part: Part) -> list[int]:
        number = {token: at for at, token in enumerate(part.path + part.tokens)}
        return [number.get(self.parents[token], -1) for token in number]


def backward(
    model: Any,
    batch: TreeBatch,
    parents: Sequence[int],
    max_tokens: int,
    loss: Loss,
    **options: Any,
) -> None:
    """Add to the model's gradients those of a packed batch, whose tokens have `parents` there.

    Each token is computed once, forwards and backwards, but not all at a time: see `partition.plan`.
    """
    walk = _Walk(
        model,
        batch.ids_BT[0],
        batch.positions_BT[0],
        parents,
        loss,
        batch.routes_PLK,
        options,
    )
    for part in plan(parents, max_tokens).parts:
        walk.visit(part, ())


def _leaf(tensor: Tensor, num: int) -> Tensor:
    return tensor[:, :, :num].detach().requires_grad_()


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
