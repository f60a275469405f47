"""Resuming is going on; the schedule; a step does not depend on its micro-batches; what is not finite."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from katcore.config import SftSettings
from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.batch import micro_batches
from katcore.train.objective import Loss, Sft
from katcore.train.sft import draw, fit, without_failed
from katcore.train.trainer import Schedule, Trainer
from tests.train.trees import VOCABULARY, line, small_model

SETTINGS = SftSettings(steps=60, batch=4, lr=1e-2, warmup=5)


def samples() -> list[Sample]:
    torch.manual_seed(0)
    return [
        line(torch.randint(VOCABULARY, (4 + n % 5,)).tolist(), [False, *[True] * (3 + n % 5)])
        for n in range(12)
    ]


def trainer(max_tokens: int = 8192) -> Trainer:
    return Trainer(small_model(), Schedule(1e-2, 60, 5, 0.1), max_tokens=max_tokens)


class KilledError(Exception):
    pass


def run(checkpoint: Path, *, stop_at: int | None = None) -> Trainer:
    made = trainer()

    def report(step: int, metrics: dict[str, float]) -> None:
        if step == stop_at:
            raise KilledError

    fit(made, samples(), SETTINGS, seed=1, checkpoint=checkpoint, report=report)
    return made


def weights(made: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.pt")
    with pytest.raises(KilledError):
        run(tmp_path / "cut.pt", stop_at=55)
    resumed = run(tmp_path / "cut.pt")
    assert torch.equal(weights(whole), weights(resumed))


def test_micro_batches_change_nothing() -> None:
    one, many = trainer(), trainer(max_tokens=8)
    for _ in range(3):
        one.update(samples(), Sft())
        many.update(samples(), Sft())
    torch.testing.assert_close(weights(one), weights(many), rtol=1e-9, atol=1e-9)


def test_the_schedule_warms_up_and_decays() -> None:
    schedule = Schedule(1.0, 110, warmup=10, final_lr=0.1)
    assert schedule.at(0) == pytest.approx(0.1)
    assert schedule.at(10) == pytest.approx(1.0)
    assert schedule.at(60) == pytest.approx(0.55)
    assert schedule.at(110) == pytest.approx(0.1)


def test_an_epoch_draws_each_sample_once() -> None:
    seen = [index for step in range(3) for index in draw(12, 4, seed=5, step=step)]
    assert sorted(seen) == list(range(12))
    assert draw(12, 4, 5, 3) != draw(12, 4, 5, 0)


def test_an_answer_that_failed_is_context() -> None:
    whole = line([1] * 6, [False, True, True, False, True, False])
    assert without_failed(whole) is whole
    left = without_failed(replace(whole, failed=(0,)))
    assert left.trained == (False, False, False, False, True, False)


def test_packing_long_samples_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    padded, packed = trainer(), trainer(max_tokens=20)
    padded.update(samples(), Sft())
    monkeypatch.setattr("katcore.train.batch._LONG", 6)
    groups = list(micro_batches(samples(), max_tokens=20))
    assert [sum(len(row.tokens) for row in group) for group in groups] == [17, 10, 19, 15, 8]
    packed.update(samples(), Sft())
    torch.testing.assert_close(weights(packed), weights(padded), rtol=1e-9, atol=1e-9)


class Broken(Sft):
    """A loss that is not finite, nor is its gradient."""

    def on(self, batch: Any, samples: Sequence[Sample]) -> Loss:
        loss = super().on(batch, samples)
        return loss._replace(total=lambda terms: loss.total(terms) * math.inf)


def test_what_is_not_finite_changes_neither_weights_nor_optimizer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, skipping = (Trainer(small_model(), Schedule(1e-2, 60, final_lr=1.0)) for _ in "ab")
    for made in (whole, skipping):
        made.update(samples(), Sft())
    before = weights(skipping)
    found = skipping.update(samples(), Broken())
    assert found.keys() == {"skipped", "lr", "tokens_per_s"}
    assert found["skipped"] == 1.0
    assert torch.equal(weights(skipping), before)
    assert "update 1 is skipped: the gradient is not finite" in caplog.text
    mine, other = (made.update(samples(), Sft()) for made in (skipping, whole))
    assert (mine["skipped"], mine["loss"]) == (0.0, other["loss"])
    assert torch.equal(weights(skipping), weights(whole))
    assert (skipping.step_number, whole.step_number) == (3, 2)


def test_too_many_in_a_row_are_an_error() -> None:
    made = trainer()
    for _ in range(2):
        for _ in range(5):
            made.update(samples(), Broken())
        made.update(samples(), Sft())
    for _ in range(5):
        made.update(samples(), Broken())
    with pytest.raises(StageError, match=r"update 17: the gradient is not finite .* as in the 5 "):
        made.update(samples(), Broken())
