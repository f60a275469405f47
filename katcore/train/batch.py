"""The one batch type of training: token trees, padded, with a dense ancestor mask.

A token sees its ancestors in the tree and itself; its position is its depth. So a tree of B branches gives
each token the same logits as in each of the B plain sequences, in one pass (Tree Training, arXiv
2511.00413, section 3). Departs from the paper in the mask: dense, which is exact and saves no attention
time. Proven equal to the unrolled branches in tests/train/test_tree.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from katcore.schema.sample import Sample

Weighting = Literal["path", "once"]
"""How much a token counts that several branches share: once for each (the mean over paths), or once."""

_WORTHWHILE = 768
"""Tokens from which on a smaller batch costs less than padding."""


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """B trees of at most T tokens, N trained tokens in all.

    ids_BT, positions_BT: token ids and depths, 0 where padded. mask_BTT: what each token sees.
    at_N: the flat position whose logits predict a trained token (its parent). targets_N: its id.
    rows_N: its tree; turns_N: its turn there (`turns`). old_N: the behaviour policy's log-probability.
    weights_N: g_t / K, the share of the tree's K branches that run through it; or 1, if each counts once.
    The last two are float64, so sums over tokens are.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    mask_BTT: Tensor
    at_N: Tensor
    targets_N: Tensor
    rows_N: Tensor
    turns_N: Tensor
    old_N: Tensor
    weights_N: Tensor
    weighting: Weighting = "path"

    @property
    def num_trained(self) -> int:
        """N."""
        return len(self.targets_N)


def collate(samples: Sequence[Sample], weighting: Weighting = "path") -> TreeBatch:
    """Pad samples into a batch.

    Raises:
        ValueError: a trained token is a root: nothing predicts it.
    """
    length = max(len(sample.tokens) for sample in samples)
    shape = (len(samples), length)
    ids_BT, positions_BT = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
    )
    mask_BTT = torch.eye(length, dtype=torch.bool).repeat(len(samples), 1, 1)
    at: list[int] = []
    targets: list[int] = []
    rows: list[int] = []
    turn_numbers: list[int] = []
    old: list[float] = []
    weights: list[float] = []
    for row, sample in enumerate(samples):
        num = len(sample.tokens)
        ids_BT[row, :num] = torch.tensor(sample.tokens)
        mask_TT = ancestors(sample.parents)
        mask_BTT[row, :num, :num] = mask_TT
        positions_BT[row, :num] = mask_TT.sum(1) - 1
        turn_numbers += turns(sample)
        weights += token_weights(sample, weighting)
        for token, is_trained in enumerate(sample.trained):
            if is_trained:
                if sample.parents[token] < 0:
                    raise ValueError(
                        f"{sample.rollout_id}: token {token} is trained but has no parent"
                    )
                at.append(row * length + sample.parents[token])
                targets.append(sample.tokens[token])
                rows.append(row)
                old.append(sample.logprobs[token])
    return TreeBatch(
        ids_BT,
        positions_BT,
        mask_BTT,
        torch.tensor(at),
        torch.tensor(targets),
        torch.tensor(rows),
        torch.tensor(turn_numbers),
        torch.tensor(old, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        weighting,
    )


def ancestors(parents: Sequence[int]) -> Tensor:
    """mask_TT[q, k]: k is q or an ancestor of q. Parents come before their children."""
    num = len(parents)
    if all(parent == token - 1 for token, parent in enumerate(parents)):
        return torch.ones(num, num, dtype=torch.bool).tril()
    mask_TT = torch.eye(num, dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            mask_TT[token] |= mask_TT[parent]
    return mask_TT


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
    samples: Sequence[Sample], *, max_tokens: int, by: Callable[[Sample], str] = lambda _: ""
) -> Iterator[list[Sample]]:
    """Groups of samples of like length and equal `by`, at most `max_tokens` padded tokens in each.

    A group of `_WORTHWHILE` tokens takes no sample that is a quarter longer than its shortest: padding is
    computed like any token.
    """
    group: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: (by(sample), len(sample.tokens))):
        length, shortest = len(sample.tokens), len(group[0].tokens) if group else 0
        is_full = length * (len(group) + 1) > max_tokens
        is_wasteful = length > 1.25 * shortest and shortest * len(group) >= _WORTHWHILE
        if group and (is_full or is_wasteful or by(group[0]) != by(sample)):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
