"""Distillation: enumerated exactly, against finite differences, TRL's losses, and trees as their branches."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.advantage import group_advantages
from katcore.train.batch import TreeBatch, collate
from katcore.train.distill import (
    Distillation,
    Divergence,
    Overlap,
    Teachers,
    domain_scale,
    overlap,
    reverse_kl,
    top_k_kl,
    trusted,
)
from katcore.train.objective import Sft
from katcore.train.policy import logits_at
from katcore.train.trainer import Schedule, Trainer
from tests.train.test_attention import relative
from tests.train.trees import (
    VOCABULARY,
    alone,
    gradients,
    line,
    sample,
    small_model,
    tree_samples,
)

MODEL, TEACHER = small_model(0), small_model(1)
SHAPES = {
    "reverse-kl": Divergence(),
    "top-k of the teacher": Divergence("top-k", k=4),
    "top-k of the student": Divergence("top-k", k=4, support="student"),
    "policy-gradient": Divergence("policy-gradient", most=1.5, temperature=0.8),
    "overlap": Divergence(overlap=Overlap(5, 2.0, limit=2)),
    "likelihood": Divergence("likelihood"),
}


def logits_of(model: Any, batch: TreeBatch) -> Tensor:
    return logits_at(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT, batch.at_N)


def teach(batch: TreeBatch, samples: Any) -> Tensor:
    return logits_of(TEACHER, batch).detach()


def normal(num: int, seed: int, size: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, size, generator=generator, dtype=torch.float64)


def rows() -> list[Sample]:
    """Three rollouts whose sampler was near the model."""
    torch.manual_seed(3)
    trained = [False, True, True, False, True, True]
    made = [
        line(torch.randint(VOCABULARY, (6,)).tolist(), trained, rollout_id=f"r{n}", reward=n / 2)
        for n in range(3)
    ]
    batch = collate(made)
    chosen = logits_of(MODEL, batch).log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0]
    old = iter((chosen.detach() + 0.2 * torch.randn(len(chosen)).double()).tolist())
    return [
        replace(one, logprobs=tuple(next(old) if yes else 0.0 for yes in trained)) for one in made
    ]


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return found


# The estimator over one token, with a vocabulary of 5: every token is drawn once, and weighed exactly.


def test_likelihood_is_that_of_fine_tuning() -> None:
    samples = [sample([3, 4, 5, 6], [-1, 0, 1, 0], [False, True, True, True])]
    batch = collate(samples)
    student = logits_of(MODEL, batch).detach()
    found = Distillation(teach, Divergence("likelihood"))
    assert float(found(student, batch, samples)) == pytest.approx(
        float(Sft()(student, batch, samples)), rel=1e-12
    )
    assert found.seen()["kl"] > 0


@pytest.mark.parametrize("strength", [1.0, 0.25])
@pytest.mark.parametrize("sampler", ["itself", "another"])
def test_one_token_estimates_the_gradient_of_the_whole_kl(sampler: str, strength: float) -> None:
    student, teacher = normal(1, 1, 5).requires_grad_(), normal(1, 2, 5)
    drawn_from = student.detach() if sampler == "itself" else normal(1, 3, 5)
    old = drawn_from.log_softmax(1)[0]
    shape = Divergence("policy-gradient", strength=strength, most=1e9, clip_low=1e9, clip_high=1e9)
    expected = torch.zeros(1, 5, dtype=torch.float64)
    for token in range(5):
        one = [line([0, token], [False, True], logprobs=(0.0, float(old[token])))]
        objective = Distillation(lambda *_: teacher, shape)
        loss = objective(student, collate(one), one)
        expected += old[token].exp() * gradient_of(loss, student)
    kl = reverse_kl(student.log_softmax(1), teacher.log_softmax(1)).sum()
    torch.testing.assert_close(expected, strength * gradient_of(kl, student), rtol=0, atol=1e-14)


def test_the_estimate_holds_for_all_answers_of_two_tokens() -> None:
    """The gradient is that of the KL at every state, each as often as it is met."""
    first, second = normal(1, 4, 5).requires_grad_(), normal(5, 5, 5).requires_grad_()
    taught_first, taught_second = normal(1, 6, 5), normal(5, 7, 5)
    p, q = first.detach().log_softmax(1)[0], second.detach().log_softmax(1)
    shape = Divergence("policy-gradient", most=1e9)
    found = [torch.zeros_like(first), torch.zeros_like(second)]
    for a, b in itertools.product(range(5), repeat=2):
        logprobs = (0.0, float(p[a]), float(q[a, b]))
        one = [line([0, a, b], [False, True, True], logprobs=logprobs)]
        taught = torch.cat([taught_first, taught_second[a : a + 1]])
        loss = Distillation(lambda *_, taught=taught: taught, shape)(
            torch.cat([first, second[a : a + 1]]), collate(one), one
        )
        for total, part in zip(found, torch.autograd.grad(loss, [first, second]), strict=True):
            total += (p[a] + q[a, b]).exp() * part
    at_first = reverse_kl(first.log_softmax(1), taught_first.log_softmax(1))
    at_second = reverse_kl(second.log_softmax(1), taught_second.log_softmax(1))
    kl = at_first.sum() + (p.exp() * at_second).sum()
    for total, part in zip(found, torch.autograd.grad(kl, [first, second]), strict=True):
        torch.testing.assert_close(total, part, rtol=0, atol=1e-14)


def test_rewards_add_what_reinforcement_would() -> None:
    """Where the teacher is the student, what is left is the policy gradient of the group's advantages."""
    samples = rows()
    batch = collate(samples)
    logits = logits_of(MODEL, batch).detach().requires_grad_()
    advantages = group_advantages(samples)
    shape = Divergence("policy-gradient", clip_low=1e9, clip_high=1e9)
    loss = Distillation(lambda *_: logits.detach(), shape, advantages=advantages)(
        logits, batch, samples
    )
    logprob = logits.log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0]
    each = [advantages[samples[row].rollout_id][0][0] for row in batch.rows_N.tolist()]
    assert sorted({round(value, 3) for value in each}) == [-1.225, 0.0, 1.225]
    ratio = (logprob - batch.old_N).exp()
    expected = -(batch.weights_N * ratio * torch.tensor(each, dtype=torch.float64)).sum()
    assert relative(loss, expected) < 1e-10


def test_differences_and_ratios_are_clipped_and_counted() -> None:
    samples = [line([0, 1, 2, 3], [False, True, True, True], logprobs=(0.0, -9.0, -1.0, -0.1))]
    student, teacher = normal(3, 8), 30 * normal(3, 9)
    objective = Distillation(lambda *_: teacher, Divergence("policy-gradient", most=2.0))
    found = objective(student, collate(samples), samples)
    total, num_held, num_cut = 0.0, 0, 0
    for n, (target, old) in enumerate(((1, -9.0), (2, -1.0), (3, -0.1))):
        p, q = (float(x[n].log_softmax(0)[target]) for x in (student, teacher))
        gain = max(-2.0, min(2.0, q - p))
        ratio = math.exp(p - old)
        clipped = max(0.8, min(1.28, ratio))
        total -= min(ratio * gain, clipped * gain)
        num_held += clipped * gain < ratio * gain
        num_cut += abs(q - p) > 2.0
    assert float(found) == pytest.approx(total, rel=1e-10)
    seen = objective.seen()
    assert seen["clip_rate"] == pytest.approx(num_held / 3)
    assert seen["difference_clip_rate"] == pytest.approx(num_cut / 3)
    assert num_held
    assert num_cut
    assert objective.seen() == {}


@pytest.mark.parametrize("far", [2000.0, -2000.0])
def test_no_ratio_is_too_large(far: float) -> None:
    samples = rows()
    batch = collate(samples)
    batch = replace(batch, old_N=batch.old_N - far)
    student, teacher = normal(12, 1).requires_grad_(), normal(12, 2)
    teacher[0] = student[0].detach()  # no advantage: 0, not 0 times infinity
    loss = Distillation(lambda *_: teacher, SHAPES["policy-gradient"])(student, batch, samples)
    assert loss.isfinite()
    assert gradient_of(loss, student).isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    samples = rows()
    batch = collate(samples)
    logits = logits_of(MODEL, batch).detach().requires_grad_()
    teacher = normal(batch.num_trained, 5)
    # A is taken as given, though the student is in it: here it has to be so for differences, too.
    shape = replace(SHAPES[name], strength=0.0)
    advantages = {one.rollout_id: ((0.7, -1.3),) for one in samples}
    objective = Distillation(lambda *_: teacher, shape, advantages=advantages)
    assert torch.autograd.gradcheck(lambda x: objective(x, batch, samples), (logits,), atol=1e-6)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("k", [VOCABULARY, 1000])
def test_with_all_tokens_top_k_is_the_whole_kl(k: int, support: Any) -> None:
    samples = rows()
    batch = collate(samples)
    logits = logits_of(MODEL, batch).detach().requires_grad_()
    teacher = normal(batch.num_trained, 5)
    whole = Distillation(lambda *_: teacher)(logits, batch, samples)
    part = Distillation(lambda *_: teacher, Divergence("top-k", k=k, support=support))(
        logits, batch, samples
    )
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        gradient_of(part, logits), gradient_of(whole, logits), rtol=0, atol=1e-13
    )


def test_with_all_but_one_token_the_bucket_is_that_token() -> None:
    student, teacher = normal(6, 1).requires_grad_(), normal(6, 2)
    p, q = student.log_softmax(1), teacher.log_softmax(1)
    support = q.topk(VOCABULARY - 1, 1).indices
    part, whole = top_k_kl(p, q, support), reverse_kl(p, q)
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        gradient_of(part.sum(), student), gradient_of(whole.sum(), student), rtol=0, atol=1e-13
    )


def test_top_k_is_at_most_the_kl_and_zero_at_the_teacher() -> None:
    p, q = normal(50, 1).log_softmax(1), normal(50, 2).log_softmax(1)
    found = [top_k_kl(p, q, q.topk(k, 1).indices) for k in (1, 4, 12, 22)]
    bounds = [*found, reverse_kl(p, q)]
    for less, more in itertools.pairwise(bounds):
        assert (less <= more + 1e-12).all()
    assert float(top_k_kl(p, p, p.topk(4, 1).indices).abs().max()) < 1e-13


def test_trl_has_the_same_whole_kl() -> None:
    samples = rows()
    batch = collate(samples)
    student, teacher = normal(12, 1).requires_grad_(), normal(12, 2)
    ours = Distillation(lambda *_: teacher)(student, batch, samples)
    theirs = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], batch.targets_N[None], beta=1, reduction="sum"
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert relative(gradient_of(ours, student), gradient_of(theirs, student)) < 1e-10


def test_trl_has_the_same_top_k() -> None:
    samples = rows()
    batch = collate(samples)
    student, teacher = normal(12, 1).requires_grad_(), normal(12, 2)
    shape = Divergence("top-k", k=5, support="student")
    ours = Distillation(lambda *_: teacher, shape)(student, batch, samples)
    theirs = IWOPDTrainer.generalized_jsd_loss(
        student[None], teacher[None], batch.targets_N[None], beta=1, reduction="sum", top_k=5
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert relative(gradient_of(ours, student), gradient_of(theirs, student)) < 1e-10


def test_trl_has_the_same_gradient_of_one_token() -> None:
    """Its loss is -A log p where ours is -r A: with the student as the sampler, the gradients are one."""
    samples = rows()
    student, teacher = normal(12, 1).requires_grad_(), normal(12, 2)
    batch = collate(samples)
    at = batch.targets_N[:, None]
    chosen, taught = (x.log_softmax(1).gather(1, at)[:, 0] for x in (student, teacher))
    batch = replace(batch, old_N=chosen.detach())
    ours = Distillation(lambda *_: teacher, Divergence("policy-gradient", most=1e9))(
        student, batch, samples
    )
    fake: Any = type("T", (), {"temperature": 1.0, "iw_opd_epsilon": 1e-8, "iw_opd_gamma": 0.0})()
    fake.model, fake._metrics = torch.nn.Module(), {"train": _Lists()}
    theirs = IWOPDTrainer._compute_iw_opd_loss(
        fake, student[None], batch.targets_N[None], batch.targets_N[None], taught[None]
    )
    torch.testing.assert_close(
        gradient_of(ours, student) / 12, gradient_of(theirs, student), rtol=1e-12, atol=1e-14
    )


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=20, deadline=None)
@given(tree=tree_samples(), seed=st.integers(0, 1000))
def test_a_tree_is_the_mean_of_its_branches(name: str, tree: Sample, seed: int) -> None:
    if not any(tree.trained):
        return
    generator = torch.Generator().manual_seed(seed)
    noise = (-3 + 0.3 * torch.randn(len(tree.tokens), generator=generator)).tolist()
    tree = replace(tree, logprobs=tuple(noise))
    shape = SHAPES[name]
    MODEL.zero_grad()
    batch = collate([tree])
    whole = Distillation(teach, shape)(logits_of(MODEL, batch), batch, [tree])
    whole.backward()
    whole_gradient = gradients(MODEL)
    MODEL.zero_grad()
    parts = []
    for one in alone(tree):
        if any(one.trained):
            part = collate([one])
            parts.append(Distillation(teach, shape)(logits_of(MODEL, part), part, [one]))
    single = torch.stack(parts).sum() / len(alone(tree))
    single.backward()
    assert relative(whole, single) < 1e-10
    assert relative(whole_gradient, gradients(MODEL)) < 1e-10


def test_tokens_count_for_what_is_common_and_a_long_row_of_low_ones_ends_a_path() -> None:
    p = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]]).double()
    q = torch.tensor([[4.0, 3, 1, 2], [4, 3, 2, 1]]).double()
    assert overlap(p, q, 2).tolist() == [1.0, 0.0]
    assert overlap(p, q, 3).tolist() == [2 / 3, 2 / 3]
    #        0 -> 1T -> 2T -> 3 -> 4T -> 5T and 2 -> 6T
    tree = sample([0] * 7, [-1, 0, 1, 2, 3, 4, 2], [False, True, True, False, True, True, True])
    lows = torch.tensor([0.2, 0.4, 1.0, 0.6, 0.8])
    shape = Overlap(5, 1.0, limit=2)
    assert trusted(lows, [tree], shape).tolist() == pytest.approx([0.2, 0.4, 0, 0, 0])
    assert trusted(lows, [tree], replace(shape, limit=3)).tolist() == pytest.approx(lows.tolist())
    assert trusted(lows, [tree], replace(shape, power=2, limit=0))[0] == pytest.approx(0.04)
    mixed = torch.tensor([0.2, 0.9, 0.3, 0.3, 0.8])
    assert trusted(mixed, [tree], shape).tolist() == pytest.approx(mixed.tolist())


def test_every_domain_weighs_the_same_where_it_should() -> None:
    many = [replace(one, domain="many") for one in rows() for _ in range(3)]
    few = [replace(rows()[0], domain="few")]
    scale = domain_scale(many + few)
    model = small_model(0)
    trainer = Trainer(model, Schedule(0.0, 1))
    objective = Distillation(teach, scale=scale)
    found = trainer.update(many + few, objective, by=lambda one: one.domain)
    each = [trainer.update(part, Distillation(teach))["loss"] for part in (many, few)]
    assert found["loss"] == pytest.approx(sum(each) / 2, rel=1e-10)
    seen = objective.seen()
    assert [seen["kl/many"], seen["kl/few"]] == pytest.approx(each, rel=1e-10)
    assert seen["kl"] == pytest.approx((9 * each[0] + each[1]) / 10, rel=1e-10)


def test_what_is_seen() -> None:
    samples = rows()
    batch = collate(samples)
    student, teacher = normal(12, 1), normal(12, 2)
    marks = {one.rollout_id: [False, False, True, n == 1] for n, one in enumerate(samples)}
    objective = Distillation(lambda *_: teacher, SHAPES["top-k of the teacher"], calls=marks)
    objective(student, batch, samples)
    seen = objective.seen()
    p, q = student.log_softmax(1), teacher.log_softmax(1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert seen["kl"] == seen["kl/d"] == pytest.approx(float(kl.mean()), rel=1e-10)
    assert seen["kl_calls"] == pytest.approx(float(kl[[2, 6, 7, 10]].mean()), rel=1e-10)
    entropy = torch.distributions.Categorical(logits=p).entropy().mean()
    assert seen["entropy"] == pytest.approx(float(entropy), rel=1e-10)
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True))
    assert seen["agreement"] == pytest.approx(same / 12)
    assert "kl_calls" not in Distillation(lambda *_: teacher).seen()


def test_reverse_kl_is_zero_at_the_teacher_and_positive_elsewhere() -> None:
    samples = rows()
    batch = collate(samples)
    logits = normal(12, 1)
    same = Distillation(lambda *_: logits + 3.0)(logits, batch, samples)
    assert float(same) == pytest.approx(0.0, abs=1e-12)
    assert float(Distillation(lambda *_: logits * 2)(logits, batch, samples)) > 0.01


def test_a_task_may_have_a_teacher_of_its_own() -> None:
    samples = [line([1, 2], [False, True], task_id=name) for name in ("a", "b")]
    teachers = Teachers({"d": MODEL, "e": TEACHER}, {("d", "b"): "e"})
    assert [teachers.name(one) for one in samples] == ["d", "e"]
    for one, model in zip(samples, (MODEL, TEACHER), strict=True):
        batch = collate([one])
        found = teachers(batch, [one])[torch.arange(batch.num_trained)]
        torch.testing.assert_close(found, logits_of(model, batch).detach())
    with pytest.raises(ValueError, match="too many values"):
        teachers(collate(samples), samples)


def test_ids_that_were_not_sampled_are_refused() -> None:
    samples = [line([1, 2], [False, True], origin="scripted")]
    with pytest.raises(StageError, match="scripted, not sampled"):
        Distillation(teach)(torch.zeros(1, VOCABULARY), collate(samples), samples)
