"""Which tasks RL attempts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from katcore.pipeline.frontier import Frontier, with_differences
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Verdict
from katcore.schema.task import SandboxSpec, Task


def task(number: int, group: str) -> Task:
    return Task(f"{group}-{number}", "d", "p", Path(), SandboxSpec(Path()), group)


TASKS = [task(number, group) for group in ("never", "half", "always") for number in range(100)]


def rollout(group: str, reward: float | None) -> Rollout:
    outcome = Outcome.SANDBOX_FAILED if reward is None else Outcome.SCORED
    return Rollout("r", "t", "d", group, 0, outcome, Trajectory("r", ()), Verdict(reward))


def learned() -> Frontier:
    frontier = Frontier(TASKS, seed=0)
    frontier.learn([rollout("never", 0.0), rollout("always", 1.0)])
    frontier.learn([rollout("half", 0.0), rollout("half", 1.0), rollout("half", None)])
    return frontier


def test_most_tasks_are_of_groups_that_pass_sometimes() -> None:
    found = Counter(item.group for step in range(50) for item in learned().choose(10, step))
    assert found["half"] > 3 * max(found["never"], found["always"])
    assert min(found["never"], found["always"]) > 0


def test_no_task_twice_and_no_more_than_there_are() -> None:
    assert len({item.id for item in learned().choose(40, 3)}) == 40
    assert len(learned().choose(1000, 3)) == len(TASKS)


def test_seed_step_and_rates_decide() -> None:
    one, other = learned(), Frontier(TASKS, 0, learned().rates)
    assert one.choose(10, 5) == other.choose(10, 5)
    assert one.choose(10, 5) != one.choose(10, 6)
    assert one.choose(10, 5) != Frontier(TASKS, 1, one.rates).choose(10, 5)


def test_what_was_not_scored_says_nothing() -> None:
    frontier = Frontier(TASKS, seed=0)
    frontier.learn([rollout("half", None)])
    assert frontier.rates == {}


def attempts(rewards: dict[str, list[float | None]], asked: list[int]) -> Any:
    async def make(tasks: Sequence[Task]) -> list[Rollout]:
        asked.append(len(tasks))
        return [
            replace(rollout("g", value), task_id=item.id, attempt=number)
            for item in tasks
            for number, value in enumerate(rewards.get(item.id, [0.0, 1.0]))
        ]

    return make


async def test_tasks_without_a_difference_are_replaced_while_there_are_others() -> None:
    tasks = TASKS[:7]
    rewards: dict[str, list[float | None]] = {
        tasks[0].id: [1.0, 1.0],
        tasks[1].id: [0.0, None],
        tasks[3].id: [0.0, 0.0],
    }
    asked: list[int] = []
    made = await with_differences(attempts(rewards, asked), tasks, 3)
    # Of three one differs; of the two in their places one does not, and the next one does.
    assert asked == [3, 5, 6]
    assert {item.task_id for item in made} == {item.id for item in tasks[:6]}
    asked.clear()
    await with_differences(attempts(rewards, asked), tasks[:4], 3)
    assert asked == [3, 4], "there are no more"
    asked.clear()
    await with_differences(attempts(rewards, asked), tasks[:3], 3)
    assert asked == [3], "without `resample` nothing is replaced"
    asked.clear()
    await with_differences(attempts({}, asked), tasks, 3)
    assert asked == [3], "all differ"
