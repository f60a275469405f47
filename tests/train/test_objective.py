"""Objectives against finite differences, and against the formulas written out on their own."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head, selective_log_softmax

from katcore.schema.sample import Sample
from katcore.train.batch import collate
from katcore.train.engine import Engine
from katcore.train.objective import Sft, token_logprobs
from tests.train.test_attention import relative
from tests.train.trees import VOCABULARY, gradients, line, small_model


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


def trl_loss(model: Any, samples: list[Sample], num_all: int | None) -> torch.Tensor:
    """What TRL's trainer computes, of rows padded as it has them."""
    length = max(len(one.tokens) for one in samples)
    ids, seen = torch.zeros(2, len(samples), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, one in enumerate(samples):
        own = slice(len(one.tokens))
        ids[row, own], seen[row, own] = torch.tensor(one.tokens), 1
        labels[row, own] = torch.tensor(one.tokens).where(torch.tensor(one.trained), -100)
    fake: Any = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        accelerator=SimpleNamespace(
            parallelism_config=None, gather_for_metrics=lambda value: value
        ),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": seen}
    num = None if num_all is None else torch.tensor(num_all)
    loss: torch.Tensor = SFTTrainer.compute_loss(fake, model, inputs, num_items_in_batch=num)
    return loss


def with_own_head(model: Any) -> Any:
    """Gives what TRL's fused head does, by TRL's log-softmax: the head itself computes in float32."""

    def forward(input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> Any:
        logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1]
        is_learnt = labels[:, 1:] != -100
        logprobs = selective_log_softmax(logits, labels[:, 1:].clamp(min=0)) * is_learnt
        nothing = torch.zeros_like(logprobs)
        return SimpleNamespace(
            log_probs=logprobs, label_mask=is_learnt, entropy=nothing, is_top1=nothing
        )

    return forward


@pytest.mark.parametrize("num_all", [None, 40])
@pytest.mark.parametrize(("is_fused", "limit"), [(False, 1e-10), (True, 1e-5)])
def test_trl_has_the_same_loss_and_gradients(
    num_all: int | None, limit: float, *, is_fused: bool
) -> None:
    """The mean over the tokens of these rows, or over those of a whole step."""
    model = small_model()
    samples = [*rows(), line([3, 1, 4, 1], [False, False, True, True], rollout_id="short")]
    loss = Engine(model).backward(samples, Sft(), num_all or Sft().weight(samples, "path"))
    ours = gradients(model)
    model.zero_grad()
    if is_fused:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    theirs = trl_loss(model if is_fused else with_own_head(model), samples, num_all)
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), rel=limit)
    assert relative(ours, gradients(model)) < limit


def test_log_probabilities_are_after_temperature() -> None:
    logits = torch.randn(4, VOCABULARY, dtype=torch.float64)
    targets = torch.tensor([0, 3, 5, 22])
    expected = torch.distributions.Categorical(logits=logits / 0.7).log_prob(targets)
    torch.testing.assert_close(token_logprobs(logits, targets, 0.7), expected)
