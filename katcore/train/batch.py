"""The one batch type of training: token trees in rows, and what the loss has to know of their trained tokens.

A token sees its ancestors in the tree and itself; its position is its depth. So a tree of B branches gives
each token the same logits as in each of the B plain sequences, in one pass (Tree Training, arXiv
2511.00413, section 3). How trees lie in rows is in `layout`. Proven equal to the unrolled branches in
tests/train/test_tree.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train import replay
from katcore.train.forest import depths
from katcore.train.layout import Layout, Mask, Rows, packed, padded
from katcore.train.replay import Routes

Weighting = Literal["path", "once"]
"""How much a token counts that several branches share: once for each (the mean over paths), or once."""

_WORTHWHILE = 768
"""Tokens from which on a smaller batch costs less than padding."""

_LONG = 256
"""Tokens from which on a tree is packed: then attention by pieces costs less than a dense mask."""


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Trees in B rows of T tokens, N trained tokens in all.

    ids_BT, positions_BT: token ids and depths. mask_BTT: what each token sees (`layout.Mask`).
    at_N: the flat position whose logits predict a trained token (its parent). targets_N: its id.
    rows_N: its tree; turns_N: its turn there (`turns`). old_N: the behaviour policy's log-probability.
    weights_N: g_t / K, the share of the tree's K branches that run through it; or 1, if each counts once.
    The last two are float64, so sums over tokens are. counts_P: how many branches the token at each of the
    B * T places stands for, 0 where there is none. routes_PLK: the experts it is sent to (`replay`), if
    they are given.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    mask_BTT: Mask
    at_N: Tensor
    targets_N: Tensor
    rows_N: Tensor
    turns_N: Tensor
    old_N: Tensor
    weights_N: Tensor
    counts_P: Tensor
    weighting: Weighting = "path"
    routes_PLK: Tensor | None = None

    @property
    def num_trained(self) -> int:
        """N."""
        return len(self.targets_N)

    def only(self, chosen_M: Tensor) -> "TreeBatch":
        """With M of the trained tokens; all tokens are still there to be seen."""
        per_token = {
            name: getattr(self, name)[chosen_M]
            for name in ("at_N", "targets_N", "rows_N", "turns_N", "old_N", "weights_N")
        }
        return replace(self, **per_token)


def collate(
    samples: Sequence[Sample],
    weighting: Weighting = "path",
    layout: Layout | None = None,
    routes: Routes | None = None,
) -> TreeBatch:
    """Put samples into a batch, by default `padded` or, if one of them is long, `packed`.

    Raises:
        ValueError: a trained token is a root: nothing predicts it.
        StageError: there are routes, but none of a sample.
    """
    if layout is None:
        layout = padded if max(len(sample.tokens) for sample in samples) < _LONG else packed
    rows = layout(samples)
    at: list[int] = []
    targets: list[int] = []
    numbers: list[int] = []
    turn_numbers: list[int] = []
    old: list[float] = []
    weights: list[float] = []
    counts_P = torch.zeros(rows.ids_BT.numel())
    for number, (sample, places) in enumerate(zip(samples, rows.places, strict=True)):
        turn_numbers += turns(sample)
        weights += token_weights(sample, weighting)
        counts_P[places] = (
            torch.tensor(sample.branches, dtype=torch.float) if weighting == "path" else 1.0
        )
        for token, is_trained in enumerate(sample.trained):
            if is_trained:
                if sample.parents[token] < 0:
                    raise ValueError(
                        f"{sample.rollout_id}: token {token} is trained but has no parent"
                    )
                at.append(places[sample.parents[token]])
                targets.append(sample.tokens[token])
                numbers.append(number)
                old.append(sample.logprobs[token])
    return TreeBatch(
        rows.ids_BT,
        rows.positions_BT,
        rows.mask,
        torch.tensor(at),
        torch.tensor(targets),
        torch.tensor(numbers),
        torch.tensor(turn_numbers),
        torch.tensor(old, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        counts_P,
        weighting,
        None if routes is None else _routed(samples, rows, routes),
    )


def _routed(samples: Sequence[Sample], rows: Rows, routes: Routes) -> Tensor:
    names = [sample.rollout_id for sample in samples]
    if missing := [name for name in names if name not in routes]:
        raise StageError(f"{missing[0]}: no routes to replay; record them while it is sampled")
    num, shape = rows.ids_BT.numel(), routes[names[0]].shape[1:]
    routes_PLK = torch.full((num, *shape), replay.NONE, dtype=torch.int16)
    for name, places in zip(names, rows.places, strict=True):
        routes_PLK[places[: len(routes[name])]] = routes[name]
    return routes_PLK


def turns(sample: Sample) -> list[int]:
    """The turn of each trained token, from 0, in the order of the tree.

    A turn is one answer of the policy: trained tokens each of which follows the one before it.
    """
    numbers: list[int] = []
    last = -1
    for token, (is_trained, parent) in enumerate(zip(sample.trained, sample.parents, strict=True)):
        if is_trained:
            is_new = not numbers or parent != token - 1 or last != token - 1
            numbers.append((numbers[-1] if numbers else -1) + is_new)
            last = token
    return numbers


def token_weights(sample: Sample, weighting: Weighting = "path") -> list[float]:
    """What each trained token counts."""
    leaves = num_leaves(sample)
    return [
        branches / leaves if weighting == "path" else 1.0
        for branches, is_trained in zip(sample.branches, sample.trained, strict=True)
        if is_trained
    ]


def num_leaves(sample: Sample) -> int:
    """K: how many branches the tree has (a forest has those of all its trees)."""
    roots = [at for at, parent in enumerate(sample.parents) if parent < 0]
    return sum(sample.branches[root] for root in roots)


def micro_batches(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    by: Callable[[Sample], str] = lambda _: "",
    is_unrolled: bool = False,
) -> Iterator[list[Sample]]:
    """Groups of samples of like length and equal `by`, at most `max_tokens` tokens in each, with padding.

    A group of `_WORTHWHILE` tokens takes no sample that is a quarter longer than its shortest: padding is
    computed like any token. Long trees are packed: they have none, and go with any others.
    """
    shapes = {id(sample): _shape(sample, is_unrolled) for sample in samples}
    group: list[Sample] = []
    num_rows = num_tokens = shortest = 0
    for sample in sorted(samples, key=lambda sample: (by(sample), shapes[id(sample)][1])):
        rows, length = shapes[id(sample)]
        if is_unrolled or length < _LONG:
            is_full = length * (num_rows + rows) > max_tokens
            is_unlike = length > 1.25 * shortest and shortest * num_rows >= _WORTHWHILE
        else:
            is_full = num_tokens + length > max_tokens
            is_unlike = shortest < _LONG
        if group and (is_full or is_unlike or by(group[0]) != by(sample)):
            yield group
            group = []
        if not group:
            num_rows, num_tokens, shortest = 0, 0, length
        group.append(sample)
        num_rows, num_tokens = num_rows + rows, num_tokens + length
    if group:
        yield group


def _shape(sample: Sample, is_unrolled: bool) -> tuple[int, int]:  # noqa: FBT001
    """How many rows of a batch a sample takes, and how long they are."""
    if is_unrolled:
        return num_leaves(sample), 1 + max(depths(sample.parents))
    return 1, len(sample.tokens)
