"""Objectives against finite differences, and against the formulas written out on their own."""

import math

import pytest
import torch

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.batch import collate
from katcore.train.objective import (
    Objective,
    PolicyGradient,
    ReverseKl,
    Sft,
    equal_weight,
    group_advantages,
    token_logprobs,
)
from tests.train.trees import VOCABULARY, line


def rows() -> list[Sample]:
    torch.manual_seed(3)
    made = []
    for number in range(3):
        tokens = torch.randint(VOCABULARY, (6,)).tolist()
        old = (0.0, *(-torch.rand(5) * 4).tolist())
        trained = [False, True, True, False, True, True]
        made.append(line(tokens, trained, rollout_id=f"r{number}", logprobs=old))
    return made


ADVANTAGES = {"r0": (1.3, 0.4), "r1": (-0.7, -1.1), "r2": (0.2, 2.0)}


def objectives() -> dict[str, Objective]:
    torch.manual_seed(5)
    teacher = torch.randn(12, VOCABULARY, dtype=torch.float64)
    return {
        "sft": Sft(),
        "policy-gradient": PolicyGradient(ADVANTAGES, 0.2, 0.28, 0.9),
        "reverse-kl": ReverseKl(lambda batch, samples: teacher),
    }


@pytest.mark.parametrize("name", ["sft", "policy-gradient", "reverse-kl"])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    samples = rows()
    batch = collate(samples)
    torch.manual_seed(1)
    logits = torch.randn(batch.num_trained, VOCABULARY, dtype=torch.float64, requires_grad=True)
    objective = objectives()[name]
    assert torch.autograd.gradcheck(lambda x: objective(x, batch, samples), (logits,), atol=1e-6)


def test_policy_gradient_is_ppo_written_out() -> None:
    samples = rows()
    batch = collate(samples)
    logits = torch.randn(batch.num_trained, VOCABULARY, dtype=torch.float64)
    loss = PolicyGradient(ADVANTAGES, 0.2, 0.28, 0.9)(logits, batch, samples)
    total = 0.0
    for n in range(batch.num_trained):
        scores = [float(value) / 0.9 for value in logits[n]]
        logprob = scores[batch.targets_N[n]] - math.log(sum(math.exp(value) for value in scores))
        ratio = math.exp(logprob - float(batch.old_N[n]))
        turn = n % 4 // 2  # tokens 1, 2 and 4, 5 of each row are trained
        advantage = ADVANTAGES[samples[int(batch.rows_N[n])].rollout_id][turn]
        total -= min(ratio * advantage, max(0.8, min(1.28, ratio)) * advantage)
    assert float(loss) == pytest.approx(total, rel=1e-6)


def test_reverse_kl_is_zero_at_the_teacher_and_positive_elsewhere() -> None:
    samples = rows()
    batch = collate(samples)
    logits = torch.randn(batch.num_trained, VOCABULARY, dtype=torch.float64)
    same = ReverseKl(lambda *_: logits + 3.0)(logits, batch, samples)
    other = ReverseKl(lambda *_: logits * 2)(logits, batch, samples)
    assert float(same) == pytest.approx(0.0, abs=1e-12)
    assert float(other) > 0.01


def test_log_probabilities_are_after_temperature() -> None:
    logits = torch.randn(4, VOCABULARY, dtype=torch.float64)
    targets = torch.tensor([0, 3, 5, 22])
    expected = torch.distributions.Categorical(logits=logits / 0.7).log_prob(targets)
    torch.testing.assert_close(token_logprobs(logits, targets, 0.7), expected)


def test_advantages_are_normalised_within_a_task() -> None:
    samples = [
        line([1, 2], [False, True], rollout_id=f"{task}{n}", task_id=task, reward=reward)
        for task, rewards in {"a": (1.0, 0.0, 0.0, 0.0), "b": (1.0, 1.0)}.items()
        for n, reward in enumerate(rewards)
    ]
    found = group_advantages(samples)
    assert set(found) == {"a0", "a1", "a2", "a3"}
    assert sum(value for (value,) in found.values()) == pytest.approx(0.0, abs=1e-9)
    assert found["a0"] == pytest.approx((3**0.5,), rel=1e-4)


def rollouts_of_turns(turns: dict[str, tuple[int, float]]) -> list[Sample]:
    return [
        line([1, 2] * num, [False, True] * num, rollout_id=name, task_id="t", reward=reward)
        for name, (num, reward) in turns.items()
    ]


def test_without_discount_each_turn_has_the_advantage_of_its_rollout() -> None:
    found = group_advantages(rollouts_of_turns({"a": (3, 1.0), "b": (1, 0.0)}), discount=1.0)
    assert found["a"] == pytest.approx((1.0, 1.0, 1.0), rel=1e-4)
    assert found["b"] == pytest.approx((-1.0,), rel=1e-4)


def test_a_wasted_turn_earns_less() -> None:
    found = group_advantages(rollouts_of_turns({"a": (3, 1.0), "b": (2, 0.0)}), discount=0.5)
    mean = (0.25 + 0.5 + 1.0) / 3 / 2
    spread = (sum((g - mean) ** 2 for g in (0.25, 0.5, 1.0)) / 3 / 2 + mean**2 / 2) ** 0.5
    assert found["a"] == pytest.approx([(g - mean) / spread for g in (0.25, 0.5, 1.0)], rel=1e-4)
    assert found["b"] == pytest.approx([-mean / spread] * 2, rel=1e-4)


def test_rollouts_of_any_length_weigh_the_same() -> None:
    samples = rollouts_of_turns({"a": (4, 1.0), "b": (1, 0.0)})
    found = equal_weight(group_advantages(samples), samples)
    assert sum(found["a"]) == pytest.approx(-sum(found["b"]))


def test_a_lost_sample_changes_no_other_groups_advantage() -> None:
    def group(task: str, rewards: tuple[float, ...]) -> list[Sample]:
        return [
            line([1, 2], [False, True], rollout_id=f"{task}{n}", task_id=task, reward=reward)
            for n, reward in enumerate(rewards)
        ]

    one, other = group("a", (1.0, 0.0)), group("b", (0.0, 1.0, 1.0))
    alone = group_advantages(one)
    assert {key: group_advantages(one + other)[key] for key in alone} == alone


@pytest.mark.parametrize("name", ["policy-gradient", "reverse-kl"])
def test_ids_that_were_not_sampled_are_refused(name: str) -> None:
    samples = [line([1, 2], [False, True], rollout_id="r0", origin="scripted")]
    batch = collate(samples)
    logits = torch.zeros(1, VOCABULARY)
    with pytest.raises(StageError, match="scripted, not sampled"):
        objectives()[name](logits, batch, samples)
