"""Advantages of rollouts in the group of a task and scaffold (GRPO, arXiv 2402.03300), one for each turn."""

from collections.abc import Sequence
from statistics import fmean

from katcore.schema.sample import Sample
from katcore.train.batch import turns
from katcore.train.units import Rows

Advantages = dict[str, Rows]
"""By rollout id."""


def group_advantages(samples: Sequence[Sample], *, discount: float = 1.0) -> Advantages:
    """(G - mean) / (std + 1e-6) of the turns' returns in the rollouts of a task by one scaffold.

    The return G of turn n of N is the rollout's reward times discount^(N - n): what was said long before the
    end earns less of a success, so wasted turns cost. With a discount of 1 each turn has its rollout's
    reward, as in GRPO. Mean and deviation count each rollout once, however many turns it has (as the
    turn-level objective does, with 1 / N). Groups without variance are left out.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task_id, sample.scaffold), []).append(sample)
    advantages: Advantages = {}
    for group in groups.values():
        if len({sample.reward for sample in group}) > 1:
            returns = {item.rollout_id: _returns(item, discount) for item in group}
            mean = fmean(fmean(values) for values in returns.values())
            spread = (
                fmean(fmean((value - mean) ** 2 for value in values) for values in returns.values())
                ** 0.5
            )
            advantages |= {
                name: (tuple((value - mean) / (spread + 1e-6) for value in values),)
                for name, values in returns.items()
            }
    return advantages


def no_advantage(sample: Sample) -> Rows:
    """Nothing to reinforce."""
    return ((0.0,) * (1 + turns(sample)[-1]),)


def _returns(sample: Sample, discount: float) -> tuple[float, ...]:
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
