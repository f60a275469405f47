"""Objectives against finite differences, and against the formulas written out on their own."""

import torch

from katcore.schema.sample import Sample
from katcore.train.batch import collate
from katcore.train.objective import Sft, token_logprobs
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


def test_the_gradient_is_that_of_finite_differences() -> None:
    samples = rows()
    batch = collate(samples)
    torch.manual_seed(1)
    logits = torch.randn(batch.num_trained, VOCABULARY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Sft()(x, batch, samples), (logits,), atol=1e-6)


def test_log_probabilities_are_after_temperature() -> None:
    logits = torch.randn(4, VOCABULARY, dtype=torch.float64)
    targets = torch.tensor([0, 3, 5, 22])
    expected = torch.distributions.Categorical(logits=logits / 0.7).log_prob(targets)
    torch.testing.assert_close(token_logprobs(logits, targets, 0.7), expected)
