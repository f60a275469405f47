"""Which expert teaches a task: the one that passed most of the like tasks it was evaluated on."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from katcore.schema.rollout import Rollout
from katcore.schema.task import Task

_LEAST = 8
"""Scored rollouts of each teacher from which on a rate of less than a whole domain is believed."""
_Rates = dict[tuple[str, ...], dict[str, list[float]]]


def best_teachers(
    tasks: Mapping[str, Sequence[Task]], measured: Mapping[str, Iterable[Rollout]]
) -> dict[tuple[str, str], str]:
    """The teacher of each (domain, task id); `measured` has what each teacher was evaluated on.

    Rates are of the task itself, of its group, or of its domain: the narrowest for which every teacher that
    was measured in the domain has eight scored rollouts (one, for the domain). Of equals, the domain's own
    expert is chosen; it also teaches what nobody was measured on.
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
    wide = rates.get((domain,), {})
    for key in _keys(domain, task.group, task.id):
        known = rates.get(key, {})
        is_enough = all(len(known.get(teacher, ())) >= _LEAST for teacher in wide)
        if known and (is_enough or len(key) == 1):
            passed = {teacher: sum(each) / len(each) for teacher, each in known.items()}
            return max(sorted(passed), key=lambda teacher: (passed[teacher], teacher == domain))
    return domain
