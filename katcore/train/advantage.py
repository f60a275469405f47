"""Advantages of rollouts in the group of a task and scaffold (GRPO, arXiv 2402.03300), one for each turn."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import Literal

from katcore.schema.sample import Sample
from katcore.train.batch import turns
from katcore.train.units import Rows

Baseline = Literal["group", "turn"]
Returns = tuple[float, ...]
Advantages = dict[str, Rows]
"""By rollout id."""


def group_advantages(
    samples: Sequence[Sample], *, discount: float = 1.0, baseline: Baseline = "group"
) -> Advantages:
    """How much better the turns' returns are than those of the same task by the same scaffold.

    The return G of turn n of N is the rollout's reward times discount^(N - n): what was said long before the
    end earns less of a success, so wasted turns cost. With a discount of 1 each turn has its rollout's
    reward, as in GRPO. Groups without a difference are left out.

    With the baseline `group` it is (G - mean) / (std + 1e-6) over all turns; mean and deviation count each
    rollout once, however many turns it has (as the turn-level objective does, with 1 / N). Groups of one
    reward are left out. With `turn` it is G less the mean of that turn in all rollouts that got there (of all
    turns, where only one did), as A2TGPO (arXiv 2605.06200) groups by turn, unscaled as in Dr. GRPO
    (arXiv 2503.20783): where all pass, the quick are still told from the slow.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task_id, sample.scaffold), []).append(sample)
    compare = _by_turn if baseline == "turn" else _by_group
    advantages: Advantages = {}
    for group in groups.values():
        returns = {item.rollout_id: _returns(item, discount) for item in group}
        found = compare(returns)
        if any(value for values in found.values() for value in values):
            advantages |= {name: (values,) for name, values in found.items()}
    return advantages


def _by_group(returns: Mapping[str, Returns]) -> dict[str, Returns]:
    if len({values[-1] for values in returns.values()}) == 1:
        return {}
    mean = _mean(returns)
    spread = (
        fmean(fmean((value - mean) ** 2 for value in values) for values in returns.values()) ** 0.5
    )
    return {
        name: tuple((value - mean) / (spread + 1e-6) for value in values)
        for name, values in returns.items()
    }


def _by_turn(returns: Mapping[str, Returns]) -> dict[str, Returns]:
    mean = _mean(returns)
    by_turn = [
        [value for value in column if value is not None]
        for column in zip_longest(*returns.values())
    ]
    means = [fmean(column) if len(column) > 1 else mean for column in by_turn]
    return {
        name: tuple(value - at for value, at in zip(values, means, strict=False))
        for name, values in returns.items()
    }


def _mean(returns: Mapping[str, Returns]) -> float:
    return fmean(fmean(values) for values in returns.values())


def no_advantage(sample: Sample) -> Rows:
    """Nothing to reinforce."""
    return ((0.0,) * (1 + turns(sample)[-1]),)


def _returns(sample: Sample, discount: float) -> Returns:
    num = 1 + turns(sample)[-1]
    return tuple(float(sample.reward or 0.0) * discount ** (num - 1 - turn) for turn in range(num))


def penalised(advantages: Advantages, samples: Sequence[Sample], penalty: float) -> Advantages:
    """With `penalty` taken off the advantage of every answer that failed, whatever became of its rollout.

    A rollout of a group without variance has advantages, too, if an answer of it failed.
    """
    found = dict(advantages)
    for sample in samples:
        if penalty and sample.failed:
            rows = advantages.get(sample.rollout_id, no_advantage(sample))
            found[sample.rollout_id] = tuple(
                tuple(value - penalty * (turn in sample.failed) for turn, value in enumerate(row))
                for row in rows
            )
    return found
