"""Backwards through a tree part by part (`partition`), relaying the gradients of keys and values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from katcore.train.attention import TreeMask
from katcore.train.batch import TreeBatch
from katcore.train.partition import Part, plan
from katcore.train.policy import go_back, hidden

KeyValue = tuple[Tensor, Tensor]
Ends = tuple[list[Tensor], list[Tensor]]
"""Tensors to go backwards from, and their gradients."""
Loss = Callable[[Any, Tensor], Ends]
"""From what the model says of a part, and the flat places of its tokens in the whole batch."""


@dataclass(slots=True)
class _Past:
    """By layer, the keys and values of the path above; keeps those of path and part together."""

    above: dict[int, KeyValue]
    seen: dict[int, KeyValue] = field(default_factory=dict)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """See `attention.Past`."""
        if self.above:
            key, value = (
                torch.cat(pair, dim=2) for pair in zip(self.above[layer], (key, value), strict=True)
            )
        self.seen[layer] = (key, value)
        return key, value


@dataclass(frozen=True, slots=True)
class _Walk:
    model: Any
    ids_T: Tensor
    depths_T: Tensor
    parents: Sequence[int]
    loss: Loss
    options: dict[str, Any]

    def visit(self, part: Part, above: dict[int, KeyValue]) -> None:
        """Forwards through a part, both ways through those below it, and back."""
        past = _Past(above)
        at_T = torch.tensor(part.tokens)
        found = hidden(
            self.model,
            self.ids_T[None, at_T],
            self.depths_T[None, at_T],
            TreeMask(self._parents(part), len(part.path), past),
            **self.options,
        )
        tensors, grads = self.loss(found, at_T)
        sums: dict[int, KeyValue] = {}
        for below in part.parts:
            leaves = {
                layer: (_leaf(key, len(below.path)), _leaf(value, len(below.path)))
                for layer, (key, value) in past.seen.items()
            }
            self.visit(below, leaves)
            _relay(leaves, past.seen, sums)
        for layer, pair in sums.items():
            tensors += past.seen[layer]
            grads += pair
        go_back(self.model, found, tensors, grads)

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
    walk = _Walk(model, batch.ids_BT[0], batch.positions_BT[0], parents, loss, options)
    for part in plan(parents, max_tokens).parts:
        walk.visit(part, {})


def _leaf(tensor: Tensor, num: int) -> Tensor:
    return tensor[:, :, :num].detach().requires_grad_()


def _relay(
    leaves: dict[int, KeyValue], seen: dict[int, KeyValue], sums: dict[int, KeyValue]
) -> None:
    """Add what a part below has for the keys and values of its path."""
    for layer, pair in leaves.items():
        if layer not in sums:
            key, value = seen[layer]
            sums[layer] = torch.zeros_like(key), torch.zeros_like(value)
        for total, leaf in zip(sums[layer], pair, strict=True):
            if leaf.grad is not None:
                total[:, :, : leaf.shape[2]] += leaf.grad
