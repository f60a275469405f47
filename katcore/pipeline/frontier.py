"""Which tasks a step of reinforcement learning attempts: mostly such as the policy passes sometimes.

A task that always passes, or never, teaches nothing, for its group has no variance. How often tasks pass is
estimated by task group (a kind, a package), so that it is known of tasks that were not attempted yet.
"""

import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from katcore.schema.rollout import Rollout
from katcore.schema.task import Task

_MEMORY = 0.7
_FLOOR = 0.04
"""What keeps tasks of a group coming that always pass or never do, against 0.25 at a rate of a half."""


class Frontier:
    """Draws tasks with probability p (1 - p) + floor, p being the recent pass rate of their group."""

    def __init__(
        self, tasks: Sequence[Task], seed: int, rates: Mapping[str, float] | None = None
    ) -> None:
        self._tasks = tasks
        self._seed = seed
        self.rates: dict[str, float] = dict(rates or {})

    @property
    def pass_rate(self) -> float:
        """The mean of the groups' recent pass rates: unlike a step's reward, not of hard tasks only."""
        return sum(self.rates.values()) / max(1, len(self.rates))

    def choose(self, num: int, step: int) -> list[Task]:
        """`num` different tasks (all, if there are fewer); seed, step and rates alone decide."""
        draw = random.Random(f"{self._seed}/{step}")
        keys = [draw.random() ** (1 / self._weight(task)) for task in self._tasks]
        best = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
        return [self._tasks[at] for at in best[:num]]

    def learn(self, rollouts: Iterable[Rollout]) -> None:
        """Take in what was scored."""
        rewards: dict[str, list[float]] = {}
        for rollout in rollouts:
            if rollout.reward is not None:
                rewards.setdefault(rollout.group, []).append(rollout.reward)
        for group, values in rewards.items():
            rate = sum(values) / len(values)
            self.rates[group] = _MEMORY * self.rates.get(group, rate) + (1 - _MEMORY) * rate

    def _weight(self, task: Task) -> float:
        rate = self.rates.get(task.group, 0.5)
        return rate * (1 - rate) + _FLOOR


async def with_differences(
    make: Callable[[Sequence[Task]], Awaitable[list[Rollout]]], tasks: Sequence[Task], num: int
) -> list[Rollout]:
    """What `make` makes of the first `num` tasks, and of the next ones in place of those that teach nothing.

    These are the ones whose rollouts all had one reward (dynamic sampling of DAPO, arXiv 2503.14476). It ends
    with the tasks. `make` is given all so far, and makes what it has not made.
    """
    at_once = num
    while True:
        made = await make(tasks[:at_once])
        missing = num - _num_with_difference(made)
        if missing <= 0 or at_once >= len(tasks):
            return made
        at_once += missing


def _num_with_difference(rollouts: Iterable[Rollout]) -> int:
    rewards: dict[str, set[float]] = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            rewards.setdefault(rollout.task_id, set()).add(rollout.reward)
    return sum(len(found) > 1 for found in rewards.values())
