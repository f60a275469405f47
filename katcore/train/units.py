"""What of a token tree is clipped as one, and what it is worth: tokens, turns, or whole branches.

A tree stands for its K branches, each trained as a sequence of its own: its loss is the mean of theirs. A
unit that several branches share has one ratio, so two numbers hold all that they say of it. With u_b the
weight and A_b the advantage in branch b, the sum of u_b min(r A_b, clip(r) A_b) is
plus * min(r, 1 + high) + minus * max(r, 1 - low), where plus is the sum of u_b max(A_b, 0), and minus that of
u_b min(A_b, 0). (One summed advantage would be wrong where branches disagree in sign.)
Proven against separate branches in tests/train/test_surrogate.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from katcore.schema.sample import Sample
from katcore.train.batch import Weighting, turns
from katcore.train.forest import branches, leaves

Level = Literal["token", "turn", "turn-geometric", "sequence"]
Mean = Literal["rollout", "unit"]
Rows = tuple[tuple[float, ...], ...]
"""Advantages in a tree: for each branch, in order of their leaves, one for each turn; or one row for all."""


@dataclass(frozen=True, slots=True)
class Units:
    """U units of a tree. `tokens` and `of` pair its N trained tokens with units, both numbered from 0.

    `each` is what a cost of each token counts, (N,): in a branch, that of a token is its mean over the tokens
    of the branch's units, times what these count together. `weight` is what a mean over several trees
    divides by.
    """

    tokens: list[int]
    of: list[int]
    plus: list[float]
    minus: list[float]
    each: list[float]
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
    With weighting `once` a unit counts once, with the mean of what its branches say. A turn is a unit of the
    branches that hold all of it: where one forks off in the middle of an answer, its beginning is context.

    Raises:
        ValueError: neither one row nor one for each branch; or whole branches, to be counted once.
    """
    ends = leaves(sample.parents)
    if len(rows) not in (1, len(ends)):
        raise ValueError(
            f"{sample.rollout_id}: {len(rows)} rows of advantages for {len(ends)} branches"
        )
    if level != "sequence":
        return _nested(sample, ends, rows, level, mean, weighting)
    if weighting == "once":
        raise ValueError("whole branches share tokens; they cannot be counted once")
    return _whole(sample, rows)


def _nested(
    sample: Sample, ends: list[int], rows: Rows, level: Level, mean: Mean, weighting: Weighting
) -> Units:
    """Tokens or turns. A unit belongs to the branches that hold all of it: those through its last token."""
    trained = _trained(sample)
    turn_of = turns(sample)
    of = list(range(len(trained))) if level == "token" else turn_of
    last = list(dict(zip(of, trained, strict=True)).values())
    turn = list(dict(zip(of, turn_of, strict=True)).values())
    own, own_of_token = _in_branches(sample.parents, ends, last, Counter(of), mean)
    share = _sums(sample.parents, own, last)
    each = _sums(sample.parents, own_of_token, last)
    if weighting == "once":
        share = [1.0 / len(last) if mean == "rollout" else 1.0] * len(last)
        each = [sum(share) / len(trained)] * len(last)

    def part(unit: int, leaf: int) -> float:
        return own[leaf] if weighting == "path" else share[unit] / sample.branches[last[unit]]

    if len(rows) == 1:
        said = [share_of * rows[0][number] for share_of, number in zip(share, turn, strict=True)]
        plus, minus = [max(value, 0.0) for value in said], [min(value, 0.0) for value in said]
    else:
        plus, minus = _signed(sample, rows, last, turn, part)
    weight = 1.0 if mean == "rollout" else sum(share)
    return Units(list(range(len(trained))), of, plus, minus, [each[unit] for unit in of], weight)


def _signed(
    sample: Sample,
    rows: Rows,
    last: Sequence[int],
    turn: Sequence[int],
    part: Callable[[int, int], float],
) -> tuple[list[float], list[float]]:
    """What branches say for and against each unit; `part(unit, leaf)` is what it counts in one of them."""
    plus, minus = [0.0] * len(last), [0.0] * len(last)
    unit_at = {at: unit for unit, at in enumerate(last)}
    for row, path in zip(rows, branches(sample.parents), strict=True):
        for unit in (unit_at[at] for at in path if at in unit_at):
            value = part(unit, path[-1]) * row[turn[unit]]
            plus[unit] += max(value, 0.0)
            minus[unit] += min(value, 0.0)
    return plus, minus


def _whole(sample: Sample, rows: Rows) -> Units:
    """Branches with a trained token. The advantage of one is the mean over its turns."""
    numbers = {at: number for number, at in enumerate(_trained(sample))}
    turn_of = turns(sample)
    made = Units([], [], [], [], [0.0] * len(numbers), 1.0)
    paths = branches(sample.parents)
    for branch, path in enumerate(paths):
        if tokens := [numbers[at] for at in path if at in numbers]:
            row = rows[branch % len(rows)]
            value = fmean(row[turn] for turn in {turn_of[token] for token in tokens}) / len(paths)
            made.tokens.extend(tokens)
            made.of.extend([len(made.plus)] * len(tokens))
            made.plus.append(max(value, 0.0))
            made.minus.append(min(value, 0.0))
            for token in tokens:
                made.each[token] += 1 / len(paths) / len(tokens)
    return made


def _trained(sample: Sample) -> list[int]:
    return [at for at, is_trained in enumerate(sample.trained) if is_trained]


def _in_branches(
    parents: Sequence[int],
    ends: Sequence[int],
    last: Sequence[int],
    sizes: Counter[int],
    mean: Mean,
) -> tuple[dict[int, float], dict[int, float]]:
    """What a unit counts in the branch of each leaf, and what a token of one does."""
    num_units = _above(parents, dict.fromkeys(last, 1))
    num_tokens = _above(parents, {at: sizes[unit] for unit, at in enumerate(last)})
    own = {
        leaf: 1 / len(ends) / (max(1, num_units[leaf]) if mean == "rollout" else 1) for leaf in ends
    }
    of_token = {leaf: own[leaf] * num_units[leaf] / max(1, num_tokens[leaf]) for leaf in ends}
    return own, of_token


def _above(parents: Sequence[int], counts: dict[int, int]) -> list[int]:
    """The sum over each token and those above it."""
    above = [counts.get(at, 0) for at in range(len(parents))]
    for at, parent in enumerate(parents):
        above[at] += above[parent] if parent >= 0 else 0
    return above


def _sums(parents: Sequence[int], at_leaves: dict[int, float], ends: Sequence[int]) -> list[float]:
    """At each of `ends`, the sum over the leaves below."""
    below = [at_leaves.get(at, 0.0) for at in range(len(parents))]
    for at in reversed(range(len(parents))):
        if parents[at] >= 0:
            below[parents[at]] += below[at]
    return [below[at] for at in ends]
