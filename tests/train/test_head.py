"""The vocabulary projection by chunks: the loss, every gradient and every metric of all logits at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train import head
from katcore.train.batch import collate, turns
from katcore.train.distill import Distillation, Divergence, Overlap, Teachers
from katcore.train.engine import Engine
from katcore.train.objective import Objective, Sft
from katcore.train.policy import logits_of
from katcore.train.surrogate import Clipped, Correction, PolicyGradient, Reference
from tests.train.test_attention import relative
from tests.train.trees import VOCABULARY, gradients, sample, small_model, tree_samples

MODEL, OTHER = small_model(0), small_model(1)
SURROGATES = {
    "token": Clipped("token", entropy=0.1),
    "turn": Clipped("turn", "rollout", kl=0.2, temperature=0.8),
    "turn-geometric": Clipped("turn-geometric", correction=Correction("icepop")),
    "sequence": Clipped("sequence", imitation=0.3, correction=Correction("truncate")),
}
DIVERGENCES = {
    "reverse-kl": Divergence(),
    "top-k of the teacher": Divergence("top-k", k=4),
    "top-k of the student": Divergence("top-k", k=4, support="student"),
    "policy-gradient": Divergence("policy-gradient", most=1.5, temperature=0.8),
    "overlap": Divergence(overlap=Overlap(5, 2.0, limit=2)),
}
TREE = sample(
    [*range(1, 13)],
    [-1, *range(5), 3, *range(6, 9), 0, 10],
    [False, *[True] * 11],
    logprobs=(-2.0, -3.0, -4.0) * 4,
    reward=1.0,
)
NAMES = ("sft", *SURROGATES, *DIVERGENCES)


def objective_of(name: str, tree: Sample) -> Objective:
    rows = {tree.rollout_id: (tuple(torch.arange(1.0 + turns(tree)[-1]).sub(0.5).tolist()),)}
    if name in SURROGATES:
        old = {tree.rollout_id: [-2.5] * sum(tree.trained)}
        reference = Reference(OTHER, SURROGATES[name].temperature)
        return PolicyGradient(rows, SURROGATES[name], old=old, reference=reference)
    if name in DIVERGENCES:
        return Distillation(Teachers({"d": OTHER}), DIVERGENCES[name], advantages=rows)
    return Sft()


def metrics(objective: Objective) -> dict[str, float]:
    if isinstance(objective, PolicyGradient):
        return objective.rates()
    return objective.seen() if isinstance(objective, Distillation) else {}


@contextmanager
def logits_at_once(num: int) -> Iterator[None]:
    """At most so many tokens' logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "MAX_LOGITS", num * VOCABULARY)
        yield


@pytest.mark.parametrize("max_tokens", [0, 5], ids=["whole", "in-parts"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(tree=tree_samples(), num=st.integers(1, 6), seed=st.integers(0, 100))
def test_chunks_are_all_logits_at_once(
    name: str, max_tokens: int, tree: Sample, num: int, seed: int
) -> None:
    if not any(tree.trained):
        return
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(tree.tokens), generator=draw).sub(3.0).tolist()
    tree = replace(tree, logprobs=tuple(noise), reward=1.0)
    found = []
    for limit in (1000, num):
        objective = objective_of(name, tree)
        MODEL.zero_grad()
        with logits_at_once(limit):
            if max_tokens:
                loss = Engine(MODEL).backward_in_parts(tree, objective, 2.0, max_tokens)
            else:
                loss = Engine(MODEL).backward([tree], objective, 2.0)
        found.append((loss, gradients(MODEL), metrics(objective)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12, abs=1e-14)
    assert relative(found[1][1], found[0][1]) < 1e-12
    assert found[1][2] == pytest.approx(found[0][2], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "policy-gradient"])
def test_the_gradient_of_chunks_is_that_of_finite_differences(name: str) -> None:
    """But for the policy gradient of distillation, which takes its advantage as given: see test_distill."""
    objective, batch = objective_of(name, TREE), collate([TREE])
    torch.manual_seed(1)
    states = torch.randn(batch.num_trained, 16, dtype=torch.float64)

    def loss(states: Tensor) -> float:
        return head.backward(MODEL, states, batch, [TREE], objective, 1.0)[0]

    with logits_at_once(2):
        grad = head.backward(MODEL, states, batch, [TREE], objective, 1.0)[1]
        for at in range(0, states.numel(), 23):
            step = torch.zeros_like(states)
            step.view(-1)[at] = 1e-5
            slope = (loss(states + step) - loss(states - step)) / 2e-5
            assert float(grad.view(-1)[at]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_no_more_logits_are_asked_for_than_may_be_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the policy, the teacher and the reference alike."""
    seen = []

    def counted(model: Any, states: Tensor) -> Tensor:
        seen.append(len(states))
        return logits_of(model, states)

    for module in ("head", "distill"):
        monkeypatch.setattr(f"katcore.train.{module}.logits_of", counted)
    with logits_at_once(3):
        Engine(MODEL).backward([TREE], objective_of(name, TREE), 1.0)
        Engine(MODEL).backward_in_parts(TREE, objective_of(name, TREE), 1.0, 5)
    assert max(seen) == 3
