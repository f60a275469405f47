"""Advantages in the group of a task."""

from dataclasses import replace

import pytest

from katcore.schema.sample import Sample
from katcore.train.advantage import group_advantages, penalised
from tests.train.trees import line


def test_advantages_are_normalised_within_a_task() -> None:
    samples = [
        line([1, 2], [False, True], rollout_id=f"{task}{n}", task_id=task, reward=reward)
        for task, rewards in {"a": (1.0, 0.0, 0.0, 0.0), "b": (1.0, 1.0)}.items()
        for n, reward in enumerate(rewards)
    ]
    found = group_advantages(samples)
    assert set(found) == {"a0", "a1", "a2", "a3"}
    assert sum(value for ((value,),) in found.values()) == pytest.approx(0.0, abs=1e-9)
    assert found["a0"][0] == pytest.approx((3**0.5,), rel=1e-4)


def rollouts_of_turns(turns: dict[str, tuple[int, float]]) -> list[Sample]:
    return [
        line([1, 2] * num, [False, True] * num, rollout_id=name, task_id="t", reward=reward)
        for name, (num, reward) in turns.items()
    ]


def test_without_discount_each_turn_has_the_advantage_of_its_rollout() -> None:
    found = group_advantages(rollouts_of_turns({"a": (3, 1.0), "b": (1, 0.0)}), discount=1.0)
    assert found["a"][0] == pytest.approx((1.0, 1.0, 1.0), rel=1e-4)
    assert found["b"][0] == pytest.approx((-1.0,), rel=1e-4)


def test_a_wasted_turn_earns_less() -> None:
    found = group_advantages(rollouts_of_turns({"a": (3, 1.0), "b": (2, 0.0)}), discount=0.5)
    mean = (0.25 + 0.5 + 1.0) / 3 / 2
    spread = (sum((g - mean) ** 2 for g in (0.25, 0.5, 1.0)) / 3 / 2 + mean**2 / 2) ** 0.5
    assert found["a"][0] == pytest.approx([(g - mean) / spread for g in (0.25, 0.5, 1.0)], rel=1e-4)
    assert found["b"][0] == pytest.approx([-mean / spread] * 2, rel=1e-4)


def test_by_turn_a_group_that_passes_tells_quick_from_slow() -> None:
    turns = {"a": (1, 1.0), "b": (3, 1.0), "c": (3, 1.0), "d": (4, 1.0)}
    found = group_advantages(rollouts_of_turns(turns), discount=0.5, baseline="turn")
    first = (1 + 0.25 + 0.25 + 0.125) / 4
    second = (0.5 + 0.5 + 0.25) / 3
    third = (1 + 1 + 0.5) / 3
    every = (1 + 2 * (0.25 + 0.5 + 1) / 3 + (0.125 + 0.25 + 0.5 + 1) / 4) / 4
    assert found["a"][0] == pytest.approx((1 - first,))
    assert found["b"][0] == pytest.approx((0.25 - first, 0.5 - second, 1 - third))
    assert found["d"][0] == pytest.approx((0.125 - first, 0.25 - second, 0.5 - third, 1 - every))
    assert not group_advantages(rollouts_of_turns(turns), discount=0.5)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_by_turn_a_group_without_a_difference_is_left_out(reward: float) -> None:
    turns = dict.fromkeys("abc", (3, reward))
    assert not group_advantages(rollouts_of_turns(turns), discount=0.5, baseline="turn")


def test_a_lost_sample_changes_no_other_groups_advantage() -> None:
    def group(task: str, rewards: tuple[float, ...]) -> list[Sample]:
        return [
            line([1, 2], [False, True], rollout_id=f"{task}{n}", task_id=task, reward=reward)
            for n, reward in enumerate(rewards)
        ]

    one, other = group("a", (1.0, 0.0)), group("b", (0.0, 1.0, 1.0))
    alone = group_advantages(one)
    assert {key: group_advantages(one + other)[key] for key in alone} == alone


def test_scaffolds_are_not_compared_with_each_other() -> None:
    a, b = rollouts_of_turns({"a": (1, 1.0), "b": (1, 0.0)})
    assert set(group_advantages([a, b])) == {"a", "b"}
    assert not group_advantages([replace(a, scaffold="cline"), replace(b, scaffold="codex")])


def test_an_answer_that_failed_is_worth_less_in_any_rollout() -> None:
    a, b = rollouts_of_turns({"a": (3, 1.0), "b": (2, 0.0)})
    samples = [replace(a, failed=(1,)), b]
    before = group_advantages(samples)
    after = penalised(before, samples, 0.5)
    assert after["b"] == before["b"]
    assert [x - y for x, y in zip(before["a"][0], after["a"][0], strict=True)] == [0.0, 0.5, 0.0]
    alone = penalised(group_advantages(samples[:1]), samples, 0.5)
    assert alone == {"a": ((0.0, -0.5, 0.0),)}
    assert penalised({}, samples, 0.0) == {}
