"""Which expert teaches a task: the one that passed most of the like tasks it was evaluated on."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from katcore.schema.rollout import Rollout
from katcore.schema.task import Task

_LEAST = 8
"""Scored rollouts of a teacher from which on a rate is believed."""
_Rates = dict[tuple[str, ...], dict[str, list[float]]]


def best_teachers(
    tasks: Mapping[str, Sequence[Task]], measured: Mapping[str, Iterable[Rollout]]
) -> dict[tuple[str, str], str]:
    """The teacher of each (domain, task id); `measured` has what each teacher was evaluated on.

    Compared are the teachers with eight scored rollouts or more in the domain, by their rates of the task
    itself, of its group, or of the domain: the narrowest for which each of them has eight. Of equals, the
    domain's own expert is chosen; it also teaches where it has fewer itself, and nothing says who is better.
    """
    rates = _rates(measured)
    return {
        (domain, task.id): _best(domain, task, rates)
        for domain, own in tasks.items()
        for task in own
    }


def _rates(measured: Mapping[str, Iterable[Rollout]]) -> _Rates:
    found: _Rates = defaultdict(lambda: defaultdict(list))
    for teacher, rollouts in measured.items():
        for rollout in rollouts:
            if rollout.reward is not None:
                for key in _keys(rollout.domain, rollout.group, rollout.task_id):
                    found[key][teacher].append(float(rollout.reward == 1.0))
    return found


def _keys(domain: str, group: str, task_id: str) -> list[tuple[str, ...]]:
    """From narrow to wide."""
    return [(domain, group, task_id), (domain, group), (domain,)]


def _best(domain: str, task: Task, rates: _Rates) -> str:
    whole = rates.get((domain,), {})
    compared = sorted(teacher for teacher, each in whole.items() if len(each) >= _LEAST)
    if domain not in compared:
        return domain
    key = next(
        key
        for key in _keys(domain, task.group, task.id)
        if all(len(rates[key][teacher]) >= _LEAST for teacher in compared)
    )
    passed = {teacher: fmean(rates[key][teacher]) for teacher in compared}
    return max(compared, key=lambda teacher: (passed[teacher], teacher == domain))
