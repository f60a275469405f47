"""How token trees lie in the rows of a batch; each way gives every token the logits it has in its branches.

- `padded`: a tree to a row, and a dense mask where one of them is no plain sequence. For short trees.
- `packed`: all trees in one row, without padding; `forest` says what each token sees.
- `unrolled`: a branch to a row, for models that cannot be given a tree. A shared token is then computed in
  each of its branches, and the loss takes its logits from the first: they are the same in all.

Proven equal to each other and to the branches run alone in tests/train/test_tree.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train.attention import TreeMask
from katcore.train.forest import branches, depths, heavy_first, is_line, renumbered

Mask = Tensor | TreeMask | None
"""What each token sees: where mask_BTT[b, q, k] is True, or its path, or all before it in its row."""


@dataclass(frozen=True, slots=True)
class Rows:
    """B rows of T tokens. `places` has for each token of each sample its flat place, b * T + t."""

    ids_BT: Tensor
    positions_BT: Tensor
    mask: Mask
    places: list[list[int]]


Layout = Callable[[Sequence[Sample]], Rows]


def padded(samples: Sequence[Sample]) -> Rows:
    """A tree to a row."""
    length = max(len(sample.tokens) for sample in samples)
    ids_BT = _filled([sample.tokens for sample in samples], length)
    places = [
        list(range(row * length, row * length + len(sample.tokens)))
        for row, sample in enumerate(samples)
    ]
    if all(is_line(sample.parents) for sample in samples):
        return Rows(ids_BT, torch.arange(length).expand_as(ids_BT), None, places)
    positions_BT = torch.zeros_like(ids_BT)
    mask_BTT = torch.eye(length, dtype=torch.bool).repeat(len(samples), 1, 1)
    for row, sample in enumerate(samples):
        num = len(sample.tokens)
        mask_TT = ancestors(sample.parents)
        mask_BTT[row, :num, :num] = mask_TT
        positions_BT[row, :num] = mask_TT.sum(1) - 1
    return Rows(ids_BT, positions_BT, mask_BTT, places)


def packed(samples: Sequence[Sample]) -> Rows:
    """All trees in one row."""
    ids: list[int] = []
    parents: list[int] = []
    places: list[list[int]] = []
    for sample in samples:
        order = heavy_first(sample.parents)
        here = [0] * len(order)
        for at, token in enumerate(order, len(ids)):
            here[token] = at
        places.append(here)
        parents += [
            len(ids) + parent if parent >= 0 else -1 for parent in renumbered(sample.parents, order)
        ]
        ids += [sample.tokens[token] for token in order]
    positions_BT = torch.tensor([depths(parents)])
    mask = None if is_line(parents) else TreeMask(parents)
    return Rows(torch.tensor([ids]), positions_BT, mask, places)


def unrolled(samples: Sequence[Sample]) -> Rows:
    """A branch to a row."""
    rows: list[list[int]] = []
    first: list[dict[int, tuple[int, int]]] = []
    for sample in samples:
        seen: dict[int, tuple[int, int]] = {}
        for path in branches(sample.parents):
            for at, token in enumerate(path):
                seen.setdefault(token, (len(rows), at))
            rows.append([sample.tokens[token] for token in path])
        first.append(seen)
    length = max(map(len, rows))
    places = [[row * length + at for _, (row, at) in sorted(seen.items())] for seen in first]
    ids_BT = _filled(rows, length)
    return Rows(ids_BT, torch.arange(length).expand_as(ids_BT), None, places)


def ancestors(parents: Sequence[int]) -> Tensor:
    """mask_TT[q, k]: k is q or an ancestor of q. Parents come before their children."""
    num = len(parents)
    if is_line(parents):
        return torch.ones(num, num, dtype=torch.bool).tril()
    mask_TT = torch.eye(num, dtype=torch.bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            mask_TT[token] |= mask_TT[parent]
    return mask_TT


def _filled(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row)] = torch.tensor(row)
    return ids_BT
