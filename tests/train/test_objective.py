"""Objectives against finite differences, and against the formulas written out on their own."""

import pytest
import torch

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.batch import collate
from katcore.train.objective import Objective, ReverseKl, Sft, token_logprobs
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


def objectives() -> dict[str, Objective]:
    torch.manual_seed(5)
    teacher = torch.randn(12, VOCABULARY, dtype=torch.float64)
    return {
        "sft": Sft(),
        "reverse-kl": ReverseKl(lambda batch, samples: teacher),
    }


@pytest.mark.parametrize("name", ["sft", "reverse-kl"])
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    samples = rows()
    batch = collate(samples)
    torch.manual_seed(1)
    logits = torch.randn(batch.num_trained, VOCABULARY, dtype=torch.float64, requires_grad=True)
    objective = objectives()[name]
    assert torch.autograd.gradcheck(lambda x: objective(x, batch, samples), (logits,), atol=1e-6)


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


def test_ids_that_were_not_sampled_are_refused() -> None:
    samples = [line([1, 2], [False, True], rollout_id="r0", origin="scripted")]
    with pytest.raises(StageError, match="scripted, not sampled"):
        objectives()["reverse-kl"](torch.zeros(1, VOCABULARY), collate(samples), samples)
