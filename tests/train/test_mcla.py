"""Averaging takes the noise that it should, and says what noise alone would clip."""

import math
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train.batch import collate
from katcore.train.mcla import averaged, common_share, noises, variance
from katcore.train.surrogate import Clipped, Correction, PolicyGradient
from katcore.train.units import Level
from tests.train.test_surrogate import ADVANTAGES, logits_of, rows
from tests.train.trees import line

NUM = 40_000


def drawn(num: int, passes: int, sigma: float, rho: float, seed: int = 0) -> Tensor:
    """Noise (K, N) of which each pass has the share rho in common with the others."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(1, num, generator=random, dtype=torch.float64)
    own = torch.randn(passes, num, generator=random, dtype=torch.float64)
    return sigma * (math.sqrt(rho) * common + math.sqrt(1 - rho) * own)


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("passes", [2, 8, 16])
@pytest.mark.parametrize("mean", ["logs", "probabilities"])
def test_the_variance_falls_by_what_the_passes_do_not_share(
    passes: int, rho: float, mean: Literal["logs", "probabilities"]
) -> None:
    noise = drawn(NUM, passes, 0.03, rho)
    left = torch.tensor(averaged({"r": noise.tolist()}, mean)["r"], dtype=torch.float64)
    wanted = rho + (1 - rho) / passes
    # The standard error of a variance of N normal draws is sqrt(2 / N) of it, 0.7 % here.
    assert float(left.var()) / 0.03**2 == pytest.approx(wanted, rel=0.028)
    assert variance({"r": noise.tolist()}) == pytest.approx((1 - rho) * 0.03**2, rel=0.028)


@pytest.mark.parametrize("mean", ["logs", "probabilities"])
def test_one_pass_is_itself_to_the_bit(mean: Literal["logs", "probabilities"]) -> None:
    values = (drawn(1000, 1, 0.3, 0.0) - 1.7).tolist()
    assert averaged({"r": values}, mean)["r"] == values[0]


@pytest.mark.parametrize("level", get_args(Level))
def test_one_pass_gives_the_loss_of_the_plain_path_to_the_bit(level: Level) -> None:
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach()
    own = {one.rollout_id: [[v for v in one.logprobs if v]] for one in samples}
    plain = PolicyGradient(ADVANTAGES, Clipped(level))(logits, batch, samples)
    mean = PolicyGradient(ADVANTAGES, Clipped(level), old=averaged(own))(logits, batch, samples)
    assert torch.equal(plain, mean)


@pytest.mark.parametrize("passes", [2, 8])
def test_the_mean_of_probabilities_is_larger_by_half_the_variance(passes: int) -> None:
    values = {"r": (drawn(NUM, passes, 0.05, 0.0) - 2.0).tolist()}
    logs, probabilities = (torch.tensor(averaged(values, kind)["r"]) for kind in MEANS)
    wanted = 0.05**2 / 2 * (1 - 1 / passes)
    assert float((probabilities - logs).mean()) == pytest.approx(wanted, rel=0.02)


MEANS: tuple[Literal["logs", "probabilities"], ...] = ("logs", "probabilities")


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.8])
def test_what_is_common_is_estimated_from_a_draw_that_shares_nothing(rho: float) -> None:
    passes = {"r": drawn(NUM, 8, 0.03, rho).tolist()}
    sampled = {"r": drawn(NUM, 1, 0.03, 0.0, seed=9)[0].tolist()}
    assert common_share(passes, sampled) == pytest.approx(rho, abs=0.02)
    still = {"r": [[-1.0, -2.0]] * 3}
    assert common_share(still, {"r": [-1.0, -2.0]}) == 0.0


# Share of turns that noise of variance 1e-3 puts outside of [0.8, 1.2], in %: rows are tokens, columns K.
TABLE = {
    16: {1: 11, 2: 3, 4: 0, 8: 0, 16: 0},
    64: {1: 42, 2: 26, 4: 11, 8: 3, 16: 0},
    256: {1: 69, 2: 57, 4: 42, 8: 26, 16: 11},
    512: {1: 78, 2: 69, 4: 57, 8: 42, 16: 26},
    2048: {1: 89, 2: 84, 4: 78, 8: 69, 16: 57},
}


def normal_rate(sd: float, low: float, high: float) -> float:
    below = 0.5 * math.erfc(-math.log(low) / sd / math.sqrt(2))
    return below + 0.5 * math.erfc(math.log(high) / sd / math.sqrt(2))


def turns_of(tokens: int, num: int) -> Sample:
    trained = [False, *([True] * tokens + [False]) * num]
    return line([1] * len(trained), trained)


@pytest.mark.parametrize("tokens", TABLE)
def test_the_share_of_turns_that_noise_alone_clips(tokens: int) -> None:
    """As the table has it, by the surrogate's own ratios of turns and the mean's own noise."""
    num = {16: 600, 64: 400, 256: 120, 512: 60, 2048: 20}[tokens]
    sample = turns_of(tokens, num)
    noise = drawn(tokens * num, 16, math.sqrt(1e-3), 0.0, seed=tokens)
    objective = PolicyGradient({"r": ((1.0,) * num,)}, Clipped("turn", clip_low=0.2, clip_high=0.2))
    for passes, percent in TABLE[tokens].items():
        rate = normal_rate(math.sqrt(tokens * 1e-3 / passes), 0.8, 1.2)
        assert round(100 * rate) == percent
        groups = noise[: 16 // passes * passes].reshape(-1, passes, tokens * num)
        means = [averaged({"r": part.tolist()}) for part in groups]
        error = math.sqrt(rate * (1 - rate) / num / len(groups))
        assert objective.outside(means, [sample]) == pytest.approx(rate, abs=4 * error + 1e-4)
        shown = objective.outside(noises({"r": noise.tolist()}, passes), [sample])
        assert shown == pytest.approx(rate, abs=4 * error + 0.01)


def test_the_root_of_a_turn_s_ratio_does_not_know_its_length() -> None:
    sample = turns_of(256, 200)
    noise = {"r": drawn(256 * 200, 1, math.sqrt(1e-3), 0.0)[0].tolist()}
    shape = Clipped("turn-geometric", clip_low=0.2, clip_high=0.2)
    assert PolicyGradient({"r": ((1.0,) * 200,)}, shape).outside([noise], [sample]) == 0.0


def mean_of(samples: list[Sample], seed: int) -> dict[str, list[float]]:
    """Eight noisy passes of the sampler's own, averaged."""
    found: dict[str, Any] = {}
    for number, one in enumerate(samples):
        own = torch.tensor([v for v in one.logprobs if v], dtype=torch.float64)
        found[one.rollout_id] = (own + drawn(len(own), 8, 0.2, 0.3, seed + number)).tolist()
    return dict(averaged(found))


@pytest.mark.parametrize("correction", [None, Correction("icepop", 0.9, 1.1)])
@pytest.mark.parametrize("level", get_args(Level))
def test_the_gradient_from_a_mean_is_that_of_finite_differences(
    level: Level, correction: Correction | None
) -> None:
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach().requires_grad_()
    apart = {one.rollout_id: [0.0, 0.2, -0.05, 0.0] for one in samples}
    objective = PolicyGradient(
        ADVANTAGES,
        Clipped(level, "rollout", correction=correction),
        old=mean_of(samples, 4),
        apart=apart,
    )
    assert torch.autograd.gradcheck(lambda x: objective(x, batch, samples), (logits,), atol=1e-6)


def test_a_mean_and_icepop_written_out() -> None:
    """Ratios start from the mean; what trainer and mean do not agree on leaves the product of its turn."""
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach()
    mean = mean_of(samples, 4)
    apart = {one.rollout_id: [0.0, 2.0, -0.05, 0.0] for one in samples}
    shape = Clipped("turn", "rollout", correction=Correction("icepop", weighs=False))
    objective = PolicyGradient(ADVANTAGES, shape, old=mean, apart=apart)
    logprob = logits.log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0].tolist()
    total = 0.0
    for row, name in enumerate(mean):
        for turn, tokens in enumerate(((0,), (2, 3))):
            ratio = math.exp(sum(logprob[4 * row + n] - mean[name][n] for n in tokens))
            advantage = ADVANTAGES[name][0][turn]
            total -= min(ratio * advantage, max(0.8, min(1.28, ratio)) * advantage) / 2
    assert float(objective(logits, batch, samples)) == pytest.approx(total, rel=1e-9)
    assert objective.rates()["dropped_rate"] == 0.25


def test_a_mean_and_truncation_written_out() -> None:
    """Ratios start from the trainer, weighed by trainer over mean, at most the bound."""
    samples = rows()
    batch = collate(samples)
    logits = logits_of(batch).detach()
    mean = mean_of(samples, 4)
    trainer = {name: [value + 0.4 for value in values] for name, values in mean.items()}
    apart = {name: [0.4] * 4 for name in mean}
    shape = Clipped("token", "rollout", correction=Correction("truncate", high=1.2))
    found = PolicyGradient(ADVANTAGES, shape, old=trainer, apart=apart)(logits, batch, samples)
    logprob = logits.log_softmax(1).gather(1, batch.targets_N[:, None])[:, 0].tolist()
    total = 0.0
    for row, name in enumerate(mean):
        for n in range(4):
            ratio = math.exp(logprob[4 * row + n] - trainer[name][n])
            advantage = ADVANTAGES[name][0][n // 2]
            total -= 1.2 * min(ratio * advantage, max(0.8, min(1.28, ratio)) * advantage) / 4
    assert float(found) == pytest.approx(total, rel=1e-9)
