"""The study measures what it says, and all of it runs."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
from typer.testing import CliRunner

from katcore.cli import app
from katcore.errors import ConfigError
from katcore.pipeline.prefill import engine_passes
from katcore.schema.call import Sampling
from katcore.study import mcla
from katcore.study.kept import Kept
from katcore.study.mcla import Report, Settings, run
from katcore.study.noise import drawn_with, injected, measured
from katcore.study.plot import lines
from katcore.study.race import WAYS, Entry, NoisyEngine, Run, Shape, race, rl_settings
from katcore.study.show import curves, pictures
from katcore.study.sorting import sorting
from katcore.train.mcla import variance
from katcore.train.moe import new_moe
from katcore.train.surrogate import Clipped, PolicyGradient
from tests.train.trees import line

TINY = Settings(
    seeds=(0,),
    base_steps=20,
    base_batch=16,
    digits=1,
    samples=4,
    ways=("one pass", "mean of 8 + IcePop", "replay + trainer"),
    shape=Shape(steps=2, prompts=4, group=4, epochs=1, minibatches=1),
)


def test_sorting_is_verified_by_its_rule() -> None:
    task = sorting(6)
    (prompt,) = task.prompts(1, random.Random(0))
    text = "".join(task.chat.token_texts([token])[token] for token in prompt)
    answer = task.answer(prompt)
    said = "".join(task.chat.token_texts([token])[token] for token in answer[:-1])
    assert (len(prompt), text[-1], said) == (7, ">", "".join(sorted(text[:-1])))
    assert answer[-1] == task.chat.end_id
    shown = task.demonstration(prompt)
    assert shown.tokens == prompt + answer
    assert shown.trained == (False,) * 7 + (True,) * 7


@pytest.mark.parametrize(("sigma", "rho"), [(0.1, 0.0), (0.1, 0.6)])
def test_injected_noise_is_found_again(sigma: float, rho: float) -> None:
    num = 300
    samples = [
        line([1] * 21, [False, *[True] * 20], rollout_id=f"r{n}", logprobs=(0.0, *[-1.0] * 20))
        for n in range(num)
    ]
    truth = {one.rollout_id: [-1.0] * 20 for one in samples}
    objective = PolicyGradient({one.rollout_id: ((1.0,),) for one in samples}, Clipped("turn"))
    noisy = drawn_with(samples, sigma, 4)
    found = measured("n", noisy, injected(truth, sigma, rho, 3), truth, objective)
    # Of 6000 tokens and 16 passes; a common part has 6000 draws alone.
    assert found.variance == pytest.approx((1 - rho) * sigma**2, rel=0.02)
    assert found.common == pytest.approx(rho, abs=0.03)
    assert found.common_estimated == pytest.approx(rho, abs=0.1)
    assert found.sampled_bias == pytest.approx(0.0, abs=4 * sigma / 6000**0.5)
    for row in found.rows:
        wanted = sigma**2 * (rho + (1 - rho) / row.passes)
        assert row.mean_square == pytest.approx(wanted, rel=0.08)
        assert row.theory == pytest.approx(wanted, rel=0.08)
    rates = [row.clipped for row in found.rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(0.60, abs=0.05)


def report(one: float, mean: float) -> Report:
    rewards = {
        ("float32", "one pass"): 0.8,
        ("noisy", "one pass"): one,
        ("noisy", "mean of 8"): mean,
    }
    runs = [
        Run(Entry(source, way, seed), [0.3, 0.5], [0.2, value], value, [{"clip_rate": 0.1}])
        for (source, way), value in rewards.items()
        for seed in (0, 1)
    ]
    return Report(TINY, 0.3, [], runs)


def test_the_verdict_is_what_was_asked_beforehand() -> None:
    assert "nothing to keep" in report(0.78, 0.8).verdict("noisy")
    assert report(0.5, 0.7).verdict("noisy") == "kept"
    assert report(0.5, 0.4).verdict("noisy") == "not kept in every seed"
    assert report(0.5, 0.4).verdict("absent") == "not run"
    assert next(iter(report(0.5, 0.4).rows()))[2:5] == ("0.500", "0.800", "0.80 0.80")


def test_a_way_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no way named 'luck'; choose from: one pass"):
        Settings(ways=("luck",))


def test_lines_are_drawn_where_they_can_be() -> None:
    made = lines("t", {"a": [(1, 0.1), (10, 0.0)], "theory": [(1, 0.1), (10, 0.01)]}, is_log=True)
    assert made.count("<polyline") == 2
    assert made.count("stroke-dasharray") == 2
    assert 'points="60.0,14.0"' in made
    assert lines("t", {"a": [(1, 0.0)]}, is_log=True) == ""
    assert "<script>" not in lines("<script>", {"<script>": [(0, 1), (1, 2)]})


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    found = asyncio.run(run(TINY, told.append, tmp_path))
    assert len(told) == TINY.num_steps
    gaps = {item.name: item.gap for item in found.noises}
    assert gaps["float32"] < 1e-5 < gaps["bfloat16"] < gaps["bfloat16, jitter 0.6"]
    # Once without noise; with noise each way, but that nothing is replayed where routers are right.
    assert len(found.runs) == 1 + 3 + 3 + 2
    assert all((len(item.rewards), len(item.learnt)) == (2, 1) for item in found.runs)
    assert all(item.metrics[0]["num_useful"] > 0 for item in found.runs)
    assert json.loads(json.dumps(found.as_json()))["runs"][0]["entry"]["way"] == "one pass"
    assert pictures(found).count("<svg") >= 3
    drawn = curves(found)
    assert len(drawn) == 3
    assert [one.count("<polyline") for one in drawn.values()] == [3, 4, 4]
    # A study that is asked for again has its runs; one that was ended makes those that are left.
    next(tmp_path.glob("float32-one-pass-0.*.json")).unlink()
    made: list[Entry] = []

    async def noted(model: Any, task: Any, entry: Entry, *given: Any) -> Run:
        made.append(entry)
        return await race(model, task, entry, *given)

    monkeypatch.setattr(mcla, "race", noted)
    again = asyncio.run(run(TINY, told.append, tmp_path))
    assert made == [Entry("float32", "one pass", 0)]
    assert len(told) == 2 * TINY.num_steps
    assert [item.learnt for item in again.runs] == [item.learnt for item in found.runs]


def test_runs_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    (made, *_) = report(0.5, 0.7).runs
    Kept(tmp_path, TINY).write(made)
    assert Kept(tmp_path, TINY).read(made.entry) == made
    assert Kept(tmp_path, TINY).read(replace(made.entry, seed=1)) is None
    assert Kept(tmp_path, replace(TINY, base_steps=21)).read(made.entry) is None


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    given = ["study", "mcla", "--to", str(tmp_path), "--seeds", "x"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert "--seeds 'x': numbers from 0 on" in result.stderr


async def test_a_noisy_engine_draws_as_the_exact_one_and_says_something_else() -> None:
    task, made = sorting(6), []
    model = new_moe(vocabulary=task.chat.vocabulary, end_id=task.chat.end_id, seed=0)
    for sigma in (0.0, 0.3):
        engine = NoisyEngine(model, task.chat, None, sigma, 1)
        samples = await task.attempt(engine, task.prompts(64, random.Random(0)), 4, 1.0)
        passes = await engine_passes(
            engine, samples, Sampling(1.0), 2, at_once=64, order=random.Random(1)
        )
        made.append((samples, passes))
    (samples, passes), (noisy, other) = made
    assert [one.tokens for one in samples] == [one.tokens for one in noisy]
    apart = [
        value - exact
        for one, true in zip(noisy, samples, strict=True)
        for value, exact in zip(one.logprobs, true.logprobs, strict=True)
        if exact
    ]
    assert (fmean(apart), pstdev(apart)) == pytest.approx((0.0, 0.3), abs=0.02)
    # Two passes differ by the noise of both.
    assert variance(other) == pytest.approx(0.09, rel=0.1)
    assert variance(passes) < 1e-9


def test_every_way_is_settings_that_hold() -> None:
    assert [name for name, way in WAYS.items() if way.replays] == ["replay", "replay + trainer"]
    for name in WAYS:
        assert rl_settings(name, Shape()).level in {"turn", "sequence"}
