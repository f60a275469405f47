"""What an optimiser step on a tree costs, beside the same step on its branches.

Seconds are those of the processor, with one thread, so that what else runs on the machine says little. Memory
is what the backward pass needs of the forward pass, weights apart, at its peak.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from katcore.config import ModelSettings
from katcore.schema.sample import Sample
from katcore.train.engine import Engine
from katcore.train.forest import branches, depths
from katcore.train.layout import Layout, packed, padded
from katcore.train.objective import Sft, sample_weight
from katcore.train.policy import limit_threads, new_policy

VOCABULARY = 4096


def model_settings(hidden: int, layers: int, context: int) -> ModelSettings:
    """A model to measure, with heads of 64."""
    heads = max(1, hidden // 64)
    return ModelSettings(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        vocabulary=VOCABULARY,
        context=context,
    )


@dataclass(frozen=True, slots=True)
class Way:
    """A way to do a step: groups of samples, one to a forward and backward pass, and how they lie."""

    groups: list[list[Sample]]
    layout: Layout | None = None
    held_tokens: int = 0
    """In parts, so many tokens at a time, if it is not 0."""


class Steps:
    """Steps of one model under AdamW. The loss of each way is the mean over the branches of the tree."""

    def __init__(self, settings: ModelSettings) -> None:
        limit_threads(1)
        self.model: Any = new_policy(settings, vocabulary=settings.vocabulary, end_id=1, seed=0)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def timed(self, way: Way) -> tuple[float, float]:
        """Seconds of a step, and its loss."""
        started_s = time.process_time()
        loss = self.loss(way)
        self._optimizer.step()
        return time.process_time() - started_s, loss

    def loss(self, way: Way) -> float:
        """The loss; the model has its gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        engine = Engine(self.model, layout=way.layout)
        weight = sum(sample_weight(sample) for group in way.groups for sample in group)
        if way.held_tokens:
            return engine.backward_in_parts(way.groups[0][0], Sft(), weight, way.held_tokens)
        return sum(engine.backward(group, Sft(), weight) for group in way.groups)

    def held_mib(self, way: Way) -> float:
        """Memory."""
        held = _Held(tensor.untyped_storage().data_ptr() for tensor in self.model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda box: box.tensor):
            self.loss(way)
        return held.peak / (1 << 20)

    def flops(self, way: Way) -> float:
        """Of the products with weights and of attention, three times the forward pass's."""
        config = self.model.config
        inner = sum(p.numel() for layer in self.model.base_model.layers for p in layer.parameters())
        head = config.vocab_size * config.hidden_size
        found = 0.0
        for sample in (sample for group in way.groups for sample in group):
            depth = depths(sample.parents)
            pairs = sum(depth) + len(depth)
            found += 6.0 * (inner * len(depth) + head * sum(sample.trained))
            found += 12.0 * config.num_hidden_layers * config.hidden_size * pairs
        return found


def as_tree(tree: Sample, max_tokens: int = 0) -> Way:
    """The tree in one pass; in parts, as in a run, if it has more than `max_tokens`, where that is not 0."""
    return Way([[tree]], packed, held_tokens=max_tokens if len(tree.tokens) > max_tokens else 0)


def in_parts(tree: Sample) -> Way:
    """With no more held than the longest branch has."""
    return Way([[tree]], packed, held_tokens=1 + max(depths(tree.parents)))


def in_packed(tree: Sample, max_tokens: int) -> Way:
    """Its branches end to end, at most `max_tokens` in a pass, none of which sees another."""
    return Way(list(_groups(lines(tree), max_tokens, is_padded=False)), packed)


def in_padded(tree: Sample, max_tokens: int) -> Way:
    """Its branches in rows, at most `max_tokens` in a pass, with padding."""
    return Way(list(_groups(lines(tree), max_tokens, is_padded=True)), padded)


def lines(tree: Sample) -> list[Sample]:
    """The branches of a tree as samples, the shortest first."""

    def of(path: list[int], values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[token] for token in path)

    found = [
        Sample(
            of(path, tree.tokens),
            tuple(range(-1, len(path) - 1)),
            of(path, tree.trained),
            of(path, tree.logprobs),
            (1,) * len(path),
            f"{tree.rollout_id}-{number}",
            *(tree.task_id, tree.domain, tree.reward, tree.origin, tree.policy_version),
        )
        for number, path in enumerate(branches(tree.parents))
    ]
    return sorted(found, key=lambda line: len(line.tokens))


def _groups(
    samples: Sequence[Sample], max_tokens: int, *, is_padded: bool
) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in samples:
        more = [*group, sample]
        num = len(sample.tokens) * len(more) if is_padded else sum(len(x.tokens) for x in more)
        if group and num > max_tokens:
            yield group
            more = [sample]
        group = more
    yield group


class _Held:
    """Bytes of the tensors that a graph keeps, each storage once."""

    def __init__(self, weights: Iterator[int]) -> None:
        self.peak = 0
        self._weights = frozenset(weights)
        self._users: dict[int, int] = {}
        self._now = 0

    def pack(self, tensor: Tensor) -> "_Box":
        """See `torch.autograd.graph.saved_tensors_hooks`."""
        storage = tensor.untyped_storage()
        return _Box(self, tensor, storage.data_ptr(), storage.nbytes())

    def change(self, place: int, num_bytes: int, by: int) -> None:
        """A storage is kept once more or less."""
        if place in self._weights:
            return
        before = self._users.get(place, 0)
        self._users[place] = before + by
        if not before or not before + by:
            self._now += by * num_bytes
            self.peak = max(self.peak, self._now)


class _Box:
    def __init__(self, held: _Held, tensor: Tensor, place: int, num_bytes: int) -> None:
        self.tensor = tensor
        self._change: Callable[[int], None] = lambda by: held.change(place, num_bytes, by)
        self._change(1)

    def __del__(self) -> None:
        self._change(-1)
