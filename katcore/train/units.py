"""What of a token tree is clipped as one, and what it is worth: tokens, turns, or whole branches.

A tree stands for its K branches, each trained as a sequence of its own: its loss is the mean of theirs. A
unit that several branches share has one ratio, so two numbers hold all that they say of it. With u_b the
weight and A_b the advantage in branch b, the sum of u_b min(r A_b, clip(r) A_b) is
plus * min(r, 1 + high) + minus * max(r, 1 - low), where plus is the sum of u_b max(A_b, 0), and minus that of
u_b min(A_b, 0). (One summed advantage would be wrong where branches disagree in sign.)
Proven against separate branches in tests/train/test_surrogate.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from katcore.schema.sample import Sample
from katcore.train.batch import Weighting, turns

Level = Literal["token", "turn", "turn-geometric", "sequence"]
Mean = Literal["rollout", "unit"]
Rows = tuple[tuple[float, ...], ...]
"""Advantages in a tree: for each branch, in order of their leaves, one for each turn; or one row for all."""


@dataclass(frozen=True, slots=True)
class Units:
    """U units of a tree. `tokens` and `of` pair its trained tokens with units, both numbered from 0.

    `weight` is what a mean over several trees divides by.
    """

    tokens: list[int]
    of: list[int]
    plus: list[float]
    minus: list[float]
    weight: float


def units(
    sample: Sample,
    rows: Rows,
    *,
    level: Level = "token",
    mean: Mean = "unit",
    weighting: Weighting = "path",
) -> Units:
    """The units of a tree with advantages `rows`.

    With mean `rollout` a branch counts 1 / K, however many units it has; with `unit` each of its units does.
    With weighting `once` a unit counts once, with the mean of what its branches say.

    Raises:
        ValueError: neither one row nor one for each branch; or whole branches, to be counted once.
    """
    leaves = sorted(set(range(len(sample.parents))) - set(sample.parents))
    if len(rows) not in (1, len(leaves)):
        raise ValueError(
            f"{sample.rollout_id}: {len(rows)} rows of advantages for {len(leaves)} branches"
        )
    if level != "sequence":
        return _nested(sample, leaves, rows, level, mean, weighting)
    if weighting == "once":
        raise ValueError("whole branches share tokens; they cannot be counted once")
    return _branches(sample, leaves, rows)


def _nested(
    sample: Sample, leaves: list[int], rows: Rows, level: Level, mean: Mean, weighting: Weighting
) -> Units:
    """Tokens or turns. A unit belongs to the branches that hold all of it: those through its last token."""
    trained = _trained(sample)
    turn_of = turns(sample)
    of = list(range(len(trained))) if level == "token" else turn_of
    last = list(dict(zip(of, trained, strict=True)).values())
    turn = list(dict(zip(of, turn_of, strict=True)).values())
    in_branch = _in_branches(sample.parents, leaves, last, mean)
    share = _sums(sample.parents, dict(zip(leaves, in_branch, strict=True)), last)
    if weighting == "once":
        share = [1.0 / len(last) if mean == "rollout" else 1.0] * len(last)
    weight = 1.0 if mean == "rollout" else sum(share)
    if len(rows) == 1:
        said = [part * rows[0][number] for part, number in zip(share, turn, strict=True)]
        return Units(
            list(range(len(trained))),
            of,
            [max(value, 0.0) for value in said],
            [min(value, 0.0) for value in said],
            weight,
        )
    plus, minus = [0.0] * len(last), [0.0] * len(last)
    unit_at = {at: unit for unit, at in enumerate(last)}
    for leaf, row, own in zip(leaves, rows, in_branch, strict=True):
        for at in _path(sample.parents, leaf):
            if (unit := unit_at.get(at)) is not None:
                part = own if weighting == "path" else share[unit] / sample.branches[at]
                plus[unit] += max(part * row[turn[unit]], 0.0)
                minus[unit] += min(part * row[turn[unit]], 0.0)
    return Units(list(range(len(trained))), of, plus, minus, weight)


def _branches(sample: Sample, leaves: list[int], rows: Rows) -> Units:
    """Branches with a trained token. The advantage of one is the mean over its turns."""
    numbers = {at: number for number, at in enumerate(_trained(sample))}
    turn_of = turns(sample)
    made = Units([], [], [], [], 1.0)
    for branch, leaf in enumerate(leaves):
        tokens = [numbers[at] for at in _path(sample.parents, leaf) if at in numbers]
        if tokens:
            row = rows[branch % len(rows)]
            value = fmean(row[turn] for turn in {turn_of[token] for token in tokens}) / len(leaves)
            made.tokens.extend(tokens)
            made.of.extend([len(made.plus)] * len(tokens))
            made.plus.append(max(value, 0.0))
            made.minus.append(min(value, 0.0))
    return made


def _trained(sample: Sample) -> list[int]:
    return [at for at, is_trained in enumerate(sample.trained) if is_trained]


def _path(parents: Sequence[int], leaf: int) -> Iterator[int]:
    at = leaf
    while at >= 0:
        yield at
        at = parents[at]


def _in_branches(
    parents: Sequence[int], leaves: Sequence[int], last: Sequence[int], mean: Mean
) -> list[float]:
    """What a unit counts in each branch: 1 / K, with mean `rollout` shared by the branch's units."""
    above = [0] * len(parents)
    for at in last:
        above[at] = 1
    for at, parent in enumerate(parents):
        above[at] += above[parent] if parent >= 0 else 0
    return [1 / len(leaves) / (max(1, above[leaf]) if mean == "rollout" else 1) for leaf in leaves]


def _sums(parents: Sequence[int], leaves: dict[int, float], ends: Sequence[int]) -> list[float]:
    """At each of `ends`, the sum over the leaves below."""
    below = [leaves.get(at, 0.0) for at in range(len(parents))]
    for at in reversed(range(len(parents))):
        if parents[at] >= 0:
            below[parents[at]] += below[at]
    return [below[at] for at in ends]
