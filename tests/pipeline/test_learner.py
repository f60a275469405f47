"""What a step of reinforcement starts its ratios from, and what averaging changes about it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from katcore.config import RlSettings
from katcore.pipeline.learner import Learner
from katcore.schema.call import ScoreRequest
from katcore.schema.sample import Sample
from katcore.train.policy import load_policy
from katcore.train.trainer import Schedule, Trainer
from tests.inference.tiny import write_tiny_model
from tests.train.trees import line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def group(folder: Path, apart: float = 0.0) -> list[Sample]:
    """Rollouts of one task, half of which passed; the sampler says `apart` more than the trainer."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for number in range(8):
        tokens = torch.randint(5, 260, (12,), generator=random).tolist()
        trained = [at > 4 for at in range(12)]
        rows.append(line(tokens, trained, rollout_id=f"r{number}", reward=float(number % 2)))
    own = Trainer(load_policy(folder), Schedule(1e-3, 1)).logprobs(rows)
    return [
        line(
            list(one.tokens),
            list(one.trained),
            rollout_id=one.rollout_id,
            reward=one.reward,
            logprobs=(0.0,) * 5 + tuple(value + apart for value in own[one.rollout_id]),
        )
        for one in rows
    ]


class Says:
    """An engine that says of a rollout what its sampler said, each pass `step` more than the one before."""

    def __init__(self, samples: Sequence[Sample], step: float = 0.0) -> None:
        self._said = {one.tokens: one.logprobs for one in samples}
        self._times = dict.fromkeys(self._said, 0)
        self._step = step

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        more = self._times[request.ids] * self._step
        self._times[request.ids] += 1
        return tuple(self._said[request.ids][place] + more for place in request.places)


async def learnt(
    folder: Path, samples: list[Sample], engine: object = None, **changes: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """The weights after a step, and its metrics."""
    trainer = Trainer(load_policy(folder), Schedule(1e-2, 10))
    settings = RlSettings(level="turn", epochs=2, minibatches=2, **changes)
    metrics = await Learner(trainer, settings, engine, seed=0, at_once=4).learn(samples)
    metrics.pop("tokens_per_s", None)
    return weights(trainer.model), metrics


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("passes", [1, 8])
@pytest.mark.parametrize("mean", ["logs", "probabilities"])
async def test_without_noise_a_mean_changes_nothing(folder: Path, passes: int, mean: str) -> None:
    samples = group(folder, 0.1)
    plain, seen = await learnt(folder, samples)
    mcla = {"passes": passes, "mean": mean}
    found, metrics = await learnt(folder, samples, Says(samples), mcla=mcla)
    if passes == 1:
        assert torch.equal(plain, found)
        assert metrics == seen
    else:
        torch.testing.assert_close(plain, found, rtol=0, atol=1e-6)
        assert metrics["mcla_variance"] == pytest.approx(0.0, abs=1e-20)
        assert metrics["noise_clip_rate"] == 0.0


async def test_one_pass_of_the_trainer_is_its_recomputation(folder: Path) -> None:
    samples = group(folder, 0.1)
    plain, _ = await learnt(folder, samples, old="trainer")
    mcla = {"passes": 1, "place": "trainer"}
    found, _ = await learnt(folder, samples, old="trainer", mcla=mcla)
    assert torch.equal(plain, found)
    several, metrics = await learnt(folder, samples, old="trainer", mcla={"place": "trainer"})
    # Passes round differently, and Adam makes a step of the rounding where a gradient is next to nothing.
    moved = plain - weights(load_policy(folder))
    assert (several - plain).norm() < 5e-3 * moved.norm()
    assert metrics["mcla_variance"] < 1e-10
    assert "mcla_common" not in metrics


async def test_a_mean_is_what_ratios_start_from(folder: Path) -> None:
    """Passes 0, 0.1, 0.2 above the sampler's are as good as a sampler that said 0.1 more."""
    samples = group(folder)
    plain, _ = await learnt(folder, group(folder, 0.1))
    found, metrics = await learnt(folder, samples, Says(samples, 0.1), mcla={"passes": 3})
    torch.testing.assert_close(plain, found, rtol=0, atol=1e-6)
    assert metrics["mcla_variance"] == pytest.approx(0.01)
    # Of seven tokens the noise of one pass is 0.7 either way or 0, that of the mean of three 0.7 / sqrt(3).
    assert metrics["noise_clip_rate_of_one"] == pytest.approx(2 / 3)
    assert metrics["noise_clip_rate"] == pytest.approx(2 / 3)


async def test_icepop_compares_the_trainer_with_the_mean(folder: Path) -> None:
    """A sampler that is off by a factor of two is as good as none; a mean that is not, is kept."""
    off = group(folder, 0.9)
    settings = {"correction": "icepop", "correction_range": (0.5, 2.0)}
    _, alone = await learnt(folder, off, **settings)
    assert alone["dropped_rate"] == 1.0
    _, mean = await learnt(folder, off, Says(group(folder)), mcla={}, **settings)
    assert mean["dropped_rate"] == 0.0


async def test_icepop_weighs_where_ratios_start_from_the_trainer(folder: Path) -> None:
    """As long as nothing is clipped, weight times ratio to the trainer is the ratio to the sampler."""
    off = [
        replace(one, logprobs=tuple(value - 0.1 * (n % 3) for n, value in enumerate(one.logprobs)))
        for one in group(folder)
    ]
    settings = {"correction": "icepop", "clip_low": 0.9, "clip_high": 9.0}
    by_trainer, _ = await learnt(folder, off, old="trainer", **settings)
    by_sampler, _ = await learnt(folder, off, **settings)
    without, _ = await learnt(folder, off, old="trainer", clip_low=0.9, clip_high=9.0)
    # Adam makes a step of rounding where a gradient is next to nothing.
    assert (by_trainer - by_sampler).norm() < 0.02 * (by_trainer - without).norm()


async def test_truncation_weighs_by_trainer_over_mean(folder: Path) -> None:
    off = group(folder, 0.9)
    settings = {"old": "trainer", "correction": "truncate"}
    right, _ = await learnt(folder, group(folder), **settings)
    mean, _ = await learnt(folder, off, Says(group(folder)), mcla={}, **settings)
    torch.testing.assert_close(right, mean, rtol=0, atol=1e-6)
    alone, _ = await learnt(folder, off, **settings)
    assert float((alone - right).abs().max()) > 1e-3


async def test_a_step_without_variance_changes_nothing(folder: Path) -> None:
    samples = [one for one in group(folder) if one.reward]
    before = load_policy(folder)
    after, metrics = await learnt(folder, samples)
    assert torch.equal(after, torch.cat([p.flatten() for p in before.parameters()]))
    assert metrics == {"num_useful": 0.0}
