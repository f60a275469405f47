"""The clipped surrogate: a tree is its branches, and TRL, loops and finite differences say the same."""

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl import GRPOTrainer

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.batch import TreeBatch, Weighting, collate, num_leaves, turns
from katcore.train.policy import logits_at
from katcore.train.surrogate import Clipped, Correction, PolicyGradient, Reference
from katcore.train.units import Level, Mean, units
from tests.train.naive import surrogate, surrogate_written_out, told_of
from tests.train.test_attention import relative
from tests.train.trees import VOCABULARY, gradients, line, sample, small_model, tree_samples

MODEL = small_model()
LEVELS: tuple[Level, ...] = get_args(Level)
MEANS: tuple[Mean, ...] = get_args(Mean)


def logits_of(batch: TreeBatch) -> Tensor:
    return logits_at(MODEL, batch.ids_BT, batch.positions_BT, batch.mask_BTT, batch.at_N)


def loss_of(objective: PolicyGradient, samples: list[Sample]) -> Tensor:
    batch = collate(samples)
    return objective(logits_of(batch), batch, samples)


def with_old(tree: Sample, seed: int) -> Sample:
    """With log-probabilities of a sampler near the model, so that some ratios are clipped and some not."""
    batch = collate([tree])
    chosen = logits_of(batch).log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0].detach()
    noise = torch.randn(len(chosen), generator=torch.Generator().manual_seed(seed)).double() * 0.3
    values = iter((chosen + noise).tolist())
    return replace(tree, logprobs=tuple(next(values) if yes else 0.0 for yes in tree.trained))


TERMS = st.fixed_dictionaries(
    {name: st.sampled_from([0.0, 0.3]) for name in ("kl", "entropy", "imitation")}
)
CORRECTIONS = st.sampled_from([None, Correction("icepop", 0.7, 1.4), Correction("truncate")])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mean", MEANS)
@settings(max_examples=12, deadline=None)
@given(
    tree=tree_samples(),
    weighting=st.sampled_from(get_args(Weighting)),
    terms=TERMS,
    correction=CORRECTIONS,
    seed=st.integers(0, 1000),
)
def test_a_tree_is_the_mean_of_its_branches(
    level: Level,
    mean: Mean,
    tree: Sample,
    weighting: Weighting,
    terms: dict[str, float],
    correction: Correction | None,
    seed: int,
) -> None:
    """Though they disagree about the turns they share, in sign too; `once`, about what each counts."""
    if not any(tree.trained) or (level == "sequence" and weighting == "once"):
        return
    tree = replace(tree, reward=1.0, failed=(0,))
    told = told_of(tree, seed, MODEL)
    shape = Clipped(level, mean, temperature=0.9, correction=correction, **terms)
    objective, batch = surrogate(shape, [tree], [told]), collate([tree], weighting)
    MODEL.zero_grad()
    whole = objective(logits_of(batch), batch, [tree])
    whole.backward()
    whole_gradient = gradients(MODEL)
    MODEL.zero_grad()
    single, weight = surrogate_written_out(shape, MODEL, tree, told, weighting)
    single.backward()
    assert relative(whole, single) < 1e-10
    assert relative(whole_gradient, gradients(MODEL)) < 1e-10
    assert objective.weight([tree], weighting) == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("level", ["token", "turn"])
@settings(max_examples=15, deadline=None)
@given(tree=tree_samples())
def test_one_row_says_what_equal_rows_say(level: Level, weighting: Weighting, tree: Sample) -> None:
    if not any(tree.trained):
        return
    row = tuple(math.sin(turn) for turn in range(1 + turns(tree)[-1]))
    given = {"level": level, "mean": "rollout", "weighting": weighting}
    one = units(tree, (row,), **given)
    each = units(tree, (row,) * num_leaves(tree), **given)
    assert one.plus == pytest.approx(each.plus)
    assert one.minus == pytest.approx(each.minus)
    assert (one.of, one.each, one.weight) == (each.of, each.each, each.weight)


def test_counted_once_a_shared_turn_counts_as_any_other() -> None:
    #                1T -> 2T, and 3 -> 4T and 5 -> 6T
    tree = sample([1] * 7, [-1, 0, 1, 2, 3, 2, 5], [False, True, True, False, True, False, True])
    row = (1.0, 1.0, 1.0)
    assert units(tree, (row,), level="turn").plus == pytest.approx([1.0, 0.5, 0.5])
    assert units(tree, (row,), level="turn", mean="rollout").plus == pytest.approx(
        [0.5, 0.25, 0.25]
    )
    once = units(tree, (row,), level="turn", mean="rollout", weighting="once")
    assert once.plus == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="cannot be counted once"):
        units(tree, (row,), level="sequence", weighting="once")
    with pytest.raises(ValueError, match="3 rows of advantages for 2 branches"):
        units(tree, (row, row, row))


def rows() -> list[Sample]:
    torch.manual_seed(3)
    trained = [False, True, True, False, True, True]
    return [
        with_old(
            line(torch.randint(VOCABULARY, (6,)).tolist(), trained, rollout_id=f"r{n}", reward=1.0),
            n,
        )
        for n in range(3)
    ]


ADVANTAGES = {"r0": ((1.3, 0.4),), "r1": ((-0.7, -1.1),), "r2": ((0.2, 2.0),)}


@pytest.mark.parametrize(
    "correction", [None, Correction("icepop", 0.8, 1.3), Correction("truncate")]
)
@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_is_that_of_finite_differences(
    level: Level, correction: Correction | None
) -> None:
    samples = rows()
    batch = collate(samples)
    torch.manual_seed(1)
    logits = logits_of(batch).detach().requires_grad_()
    old = {one.rollout_id: (batch.old_N[:4] + 0.2).tolist() for one in samples}
    objective = PolicyGradient(
        ADVANTAGES,
        Clipped(level, "rollout", kl=0.1, entropy=0.05, imitation=0.2, correction=correction),
        old=old,
        reference=lambda batch, samples: batch.old_N - 0.3,
    )
    assert torch.autograd.gradcheck(lambda x: objective(x, batch, samples), (logits,), atol=1e-6)


def test_a_turn_is_clipped_by_the_product_of_its_ratios() -> None:
    """Written out: 1/N sum of min(r A, clip(r) A) in each rollout."""
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach()
    objective = PolicyGradient(ADVANTAGES, Clipped("turn", "rollout", 0.2, 0.28, 0.9))
    found = objective(logits, batch, samples) / objective.weight(samples, "path")
    total, num_clipped = 0.0, 0
    for row in range(3):
        for turn in range(2):
            ratio = 1.0
            for n in (4 * row + 2 * turn, 4 * row + 2 * turn + 1):
                scores = [float(value) / 0.9 for value in logits[n]]
                chosen = math.exp(scores[batch.targets_N[n]]) / sum(map(math.exp, scores))
                ratio *= chosen / math.exp(float(batch.old_N[n]))
            advantage = ADVANTAGES[f"r{row}"][0][turn]
            clipped = max(0.8, min(1.28, ratio))
            num_clipped += clipped * advantage < ratio * advantage
            total -= min(ratio * advantage, clipped * advantage) / 2 / 3
    assert float(found) == pytest.approx(total, rel=1e-10)
    assert objective.rates()["clip_rate"] == pytest.approx(num_clipped / 6)
    assert objective.rates()["clip_rate"] == 0.0


def trl_loss(
    samples: list[Sample], logits: Tensor, level: str, loss_type: str, beta: float
) -> Tensor:
    """What TRL's trainer computes from the same log-probabilities; rows of four trained tokens."""
    batch = collate(samples)
    shape = (len(samples), 4)
    logprobs = (logits / 0.9).log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0]
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logprobs.reshape(shape),
            torch.zeros(shape),
            None,
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        aux_loss_enabled=False,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(samples), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(samples), 1),
        "completion_ids": batch.targets_N.reshape(shape),
        "completion_mask": torch.ones(shape),
        "advantages": torch.tensor(
            [ADVANTAGES[one.rollout_id][0][0] for one in samples], dtype=torch.float64
        ),
        "old_per_token_logps": batch.old_N.reshape(shape),
        "ref_per_token_logps": batch.old_N.reshape(shape) - 0.3,
        "num_items_in_batch": torch.tensor(4.0 * len(samples)),
    }
    loss: Tensor = GRPOTrainer._compute_loss(fake, fake.model, inputs)
    return loss


@pytest.mark.parametrize(
    ("level", "mean", "trl_level", "loss_type", "kl"),
    [
        ("token", "rollout", "token", "grpo", 0.0),
        ("token", "rollout", "token", "grpo", 0.2),
        ("token", "unit", "token", "dapo", 0.0),
        ("sequence", "rollout", "sequence", "grpo", 0.0),
    ],
)
def test_trl_has_the_same_loss_and_gradient(
    level: Level, mean: Mean, trl_level: str, loss_type: str, kl: float
) -> None:
    samples = rows()
    batch = collate(samples)
    alike = {name: ((row[0][0],) * 2,) for name, row in ADVANTAGES.items()}
    objective = PolicyGradient(
        alike,
        Clipped(level, mean, 0.2, 0.28, 0.9, kl=kl),
        reference=lambda batch, samples: batch.old_N - 0.3,
    )
    mine = logits_of(batch).detach().requires_grad_()
    loss = objective(mine, batch, samples) / objective.weight(samples, "path")
    loss.backward()
    theirs = mine.detach().clone().requires_grad_()
    other = trl_loss(samples, theirs, trl_level, loss_type, kl)
    other.backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert relative(loss, other) < 1e-10
    assert relative(mine.grad, theirs.grad) < 1e-10


@pytest.mark.parametrize("weighs", [True, False])
def test_icepop_leaves_out_what_sampler_and_trainer_do_not_agree_on(*, weighs: bool) -> None:
    """Where ratios start from the trainer, what stays weighs by trainer over sampler."""
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach()
    apart = [0.0, 3.0, -3.0, 0.1] * 3
    old = {
        one.rollout_id: [float(batch.old_N[4 * n + i]) + apart[4 * n + i] for i in range(4)]
        for n, one in enumerate(samples)
    }
    icepop = PolicyGradient(
        ADVANTAGES,
        Clipped("turn", "rollout", correction=Correction("icepop", weighs=weighs)),
        old=old,
    )
    found = icepop(logits, batch, samples)
    logprob = logits.log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0]
    total = 0.0
    for row in range(3):
        for turn, n in enumerate((4 * row, 4 * row + 3)):
            ratio = math.exp(float(logprob[n]) - old[f"r{row}"][n % 4])
            advantage = ADVANTAGES[f"r{row}"][0][turn]
            gain = min(ratio * advantage, max(0.8, min(1.28, ratio)) * advantage)
            total -= (math.exp(apart[n]) if weighs else 1.0) * gain / 2
    assert float(found) == pytest.approx(total, rel=1e-10)
    assert icepop.rates()["dropped_rate"] == 0.5


def test_icepop_by_token_is_as_its_authors_print_it() -> None:
    """M(k) = k in the range, else 0, times what PPO has: so a token that is out adds nothing to the loss."""
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach()
    apart = [0.0, 3.0, -3.0, 0.1, -0.6, 1.5, 1.7, 0.0, 0.4, -0.8, -0.5, 0.2]
    said = (batch.old_N + torch.tensor(apart, dtype=torch.float64)).tolist()
    old = {one.rollout_id: said[4 * n : 4 * n + 4] for n, one in enumerate(samples)}
    shape = Clipped("token", "rollout", correction=Correction("icepop"))
    found = PolicyGradient(ADVANTAGES, shape, old=old)(logits, batch, samples)
    logprob = logits.log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0]
    total = 0.0
    for n, log_k in enumerate(apart):
        k = math.exp(log_k)
        ratio = math.exp(float(logprob[n]) - said[n])
        advantage = ADVANTAGES[f"r{n // 4}"][0][n % 4 // 2]
        gain = min(ratio * advantage, max(0.8, min(1.28, ratio)) * advantage)
        total -= (k if 0.5 <= k <= 5.0 else 0.0) * gain / 4
    assert float(found) == pytest.approx(total, rel=1e-10)


def test_truncation_weighs_a_unit_by_what_the_sampler_should_have_said() -> None:
    samples = rows()[:1]
    batch = collate(samples)
    logits = logits_of(batch).detach()
    old = {"r0": (batch.old_N + torch.tensor([1.0, 1.0, -0.1, 0.0], dtype=torch.float64)).tolist()}
    plain = Clipped("turn", "rollout", 9.0, 9.0)
    weighed = replace(plain, correction=Correction("truncate", high=2.0))
    alone = {turn: {"r0": (tuple(float(turn == n) for n in range(2)),)} for turn in range(2)}
    for turn, factor in ((0, 2.0), (1, math.exp(-0.1))):
        without = PolicyGradient(alone[turn], plain, old=old)(logits, batch, samples)
        with_it = PolicyGradient(alone[turn], weighed, old=old)(logits, batch, samples)
        assert float(with_it) == pytest.approx(factor * float(without), rel=1e-10)


def test_a_policy_does_not_leave_itself() -> None:
    samples = rows()
    nothing = {one.rollout_id: ((0.0, 0.0),) for one in samples}
    own = PolicyGradient(nothing, Clipped(kl=1.0), reference=Reference(MODEL, 1.0))
    assert float(loss_of(own, samples).detach()) == pytest.approx(0.0, abs=1e-12)
    assert own.rates()["kl"] == pytest.approx(0.0, abs=1e-12)
    other = PolicyGradient(nothing, Clipped(kl=0.5), reference=Reference(small_model(7), 1.0))
    loss = float(loss_of(other, samples).detach())
    assert loss > 0.01
    assert other.rates()["kl"] == pytest.approx(loss / 0.5 / 12), "the mean of 12 tokens"
    assert "kl" not in PolicyGradient(nothing).rates()
    with pytest.raises(ValueError, match="needs a reference"):
        PolicyGradient(nothing, Clipped(kl=1.0))


@pytest.mark.parametrize("correction", [None, Correction("icepop"), Correction("truncate")])
@pytest.mark.parametrize("level", LEVELS)
def test_no_distance_is_too_large(level: Level, correction: Correction | None) -> None:
    """Of the old policy, the sampler or the reference, however unlike them a policy has become."""
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach().requires_grad_()
    says = logits.detach().log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0]
    far = torch.tensor([2000.0, -2000.0, 2000.0, 2000.0] * 2 + [-2000.0] * 4).double()
    by_id = {one.rollout_id: slice(4 * n, 4 * n + 4) for n, one in enumerate(samples)}
    for apart in (far, -far):
        objective = PolicyGradient(
            ADVANTAGES | {"r0": ((0.0, -1.0),)},
            Clipped(level, kl=0.1, entropy=0.1, correction=correction),
            old={name: (says - apart)[own].tolist() for name, own in by_id.items()},
            apart={name: apart.flip(0)[own].tolist() for name, own in by_id.items()},
            reference=lambda *_, apart=apart: says + apart,
        )
        loss = objective(logits, batch, samples)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert math.isfinite(float(loss.detach()))
        assert gradient.isfinite().all()
        assert all(map(math.isfinite, objective.rates().values()))


def test_what_passed_is_imitated_but_for_answers_that_failed() -> None:
    samples = [replace(one, reward=float(n != 1)) for n, one in enumerate(rows())]
    samples[2] = replace(samples[2], failed=(0,))
    nothing = {one.rollout_id: ((0.0, 0.0),) for one in samples}
    batch = collate(samples)
    logits = logits_of(batch).detach()
    found = PolicyGradient(nothing, Clipped(imitation=0.3))(logits, batch, samples)
    logprob = logits.log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0]
    wanted = -0.3 * float(logprob[:4].sum() + logprob[10:].sum())
    assert float(found) == pytest.approx(wanted, rel=1e-10)


def test_ids_that_were_not_sampled_are_refused() -> None:
    samples = [line([1, 2], [False, True], rollout_id="r0", origin="scripted")]
    with pytest.raises(StageError, match="scripted, not sampled"):
        loss_of(PolicyGradient({"r0": ((1.0,),)}), samples)


def test_a_lost_rollout_changes_nothing_for_the_others() -> None:
    """Whatever else was in the step: its loss is that of the others, over one rollout more."""
    samples = rows()
    for level in LEVELS:
        objective = PolicyGradient(ADVANTAGES, Clipped(level, "rollout"))
        whole = loss_of(objective, samples)
        parts = sum(float(loss_of(objective, [one])) for one in samples)
        assert float(whole) == pytest.approx(parts, rel=1e-10)
        assert objective.weight(samples, "path") == 3.0


def fields(value: Any) -> set[str]:
    return set(value.__dataclass_fields__)


def test_the_settings_of_reinforcement_are_those_of_the_surrogate() -> None:
    from katcore.config import RlSettings

    assert fields(Clipped) <= {*RlSettings.model_fields}
