"""Every model, mode and seed is measured on the same held-out tasks, by the engines of the settings."""

import asyncio
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kat_terminal.synthesizer import TerminalConfig, TerminalSynthesizer
from katcore.config import EvaluateSettings, LoraSettings, ModelSettings, Preset
from katcore.inference.embedded import open_engine
from katcore.pipeline.engines import open_finished
from katcore.pipeline.evaluate import held_out, run
from katcore.pipeline.plan import MODES, StageSpec
from katcore.pipeline.stage import Job
from katcore.plugin import Plugins
from katcore.schema.codec import read_lines, write_lines
from katcore.schema.rollout import Outcome, Rollout
from katcore.serving import ServeSettings
from katcore.train.policy import load_policy, save_policy
from tests.inference.fake_vllm import FakeVllm
from tests.inference.tiny import request, write_tiny_model

COLUMNS, NUM = ("base", "sft", "rl"), 2
LONG = 1024
ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
[ "$1" = -m ] || exit 0
shift 2
echo "dev=$VLLM_SERVER_DEV_MODE gpus=$CUDA_VISIBLE_DEVICES $*" >> {noted}
cd {root}
exec {python} -m tests.inference.fake_vllm "$@"
"""
"""Stands for an interpreter that has vLLM."""


def drawn(root: Path, settings: EvaluateSettings, seed: int = 0) -> list[list[str]]:
    """The ids of the tasks that each mode is measured on."""
    if not (root / "tasks").exists():
        synthesizer = TerminalSynthesizer(TerminalConfig(train=1, held_out=9))
        synthesizer.synthesize(root / "tasks", seed=0, report=lambda _: None)
    plugins = Plugins.installed()
    preset = Preset(name="p", summary="", evaluate=settings)
    spec, progress = StageSpec("terminal.evaluate", "evaluate", "terminal"), Any
    inputs = {"terminal.synthesize": root}
    job = Job(spec, preset, seed, plugins, inputs, root, root, progress)  # type: ignore[arg-type]
    expert = plugins.experts()["terminal"]
    return [[task.id for task in held_out(job, expert, mode)] for mode in MODES]


def test_sampled_tasks_are_some_of_the_greedy_ones_for_every_seed(tmp_path: Path) -> None:
    settings = EvaluateSettings(tasks=7, sampled_tasks=4)
    found = [drawn(tmp_path, settings, seed) for seed in (0, 1)]
    assert found[0] == found[1]
    greedy, sampled = found[0]
    assert (len(greedy), len(sampled)) == (7, 4)
    assert set(sampled) < set(greedy)


def test_no_more_tasks_are_sampled_than_are_greedy(tmp_path: Path) -> None:
    greedy, sampled = drawn(tmp_path, EvaluateSettings(tasks=3, sampled_tasks=5))
    assert greedy == sampled
    assert len(greedy) == 3


class Progress:
    """What a stage says of itself."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def say(self, text: str) -> None:
        pass

    def step(self, step: int, steps: int, metrics: Any = None) -> None:
        assert steps == len(COLUMNS) * 2 * NUM
        self.steps.append(step)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tasks, and three models that differ."""
    root = tmp_path_factory.mktemp("inputs")
    synthesizer = TerminalSynthesizer(TerminalConfig(train=1, held_out=NUM))
    synthesizer.synthesize(root / "tasks", seed=0, report=lambda _: None)
    found = {"terminal.synthesize": root}
    names = ("base", "terminal.sft", "terminal.rl")
    for number, name in enumerate(names):
        found[name] = root / name
        model = load_policy(write_tiny_model(root / name / "model"))
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        save_policy(model, root / name / "model", tokenizer=root / name / "model")
    return found


def a_job(inputs: dict[str, Path], out: Path, serve: ServeSettings, **given: Any) -> Job:
    out.mkdir()
    preset = Preset(
        name="p",
        summary="",
        model=ModelSettings(context=LONG),
        evaluate=EvaluateSettings(tasks=NUM, sampled_tasks=NUM),
        serve=serve,
        max_new_tokens=6,
        concurrency=4,
        **given,
    )
    spec = StageSpec("terminal.evaluate", "evaluate", "terminal", tuple(inputs))
    progress: Any = Progress()
    return Job(spec, preset, 0, Plugins.installed(), inputs, out, out, progress)


def said(out: Path, column: str, mode: str = "greedy") -> dict[str, tuple[list[Any], set[str]]]:
    """What each task's agent said, and which weights said it."""
    found = read_lines(Rollout, out / f"{column}.{mode}.terminal.jsonl")
    return {
        one.task_id: (
            [turn.ids for turn in one.trajectory.turns],
            {turn.policy_version for turn in one.trajectory.turns},
        )
        for one in found
        if one.outcome is Outcome.SCORED
    }


@pytest.mark.slow
async def test_models_are_measured_by_the_engines_that_serve(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Servers get each model in turn, and greedy answers are those of the embedded engine."""
    embedded = a_job(inputs, tmp_path / "embedded", ServeSettings())
    rates = await asyncio.to_thread(run, embedded)
    assert set(rates) == {f"{name}/{mode}/terminal" for name in COLUMNS for mode in MODES}
    async with AsyncExitStack() as stack:
        fakes = [FakeVllm(inputs["base"] / "model", context=LONG) for _ in range(2)]
        urls = tuple([await stack.enter_async_context(fake.serving()) for fake in fakes])
        serve = ServeSettings(engine="vllm", replicas=2, urls=urls, placement="disaggregated")
        served = a_job(inputs, tmp_path / "served", serve)
        assert set(await asyncio.to_thread(run, served)) == set(rates)
        assert all(fake.calls.count("/collective_rpc") == len(COLUMNS) for fake in fakes)
    greedy = []
    for column in COLUMNS:
        one, other = (said(job.out, column) for job in (embedded, served))
        assert len(one) == NUM
        assert {name: ids for name, (ids, _) in one.items()} == {
            name: ids for name, (ids, _) in other.items()
        }
        assert all(versions == {column} for _, versions in other.values())
        greedy.append([ids for ids, _ in one.values()])
    assert greedy[0] != greedy[1] != greedy[2]
    progress: Any = served.progress
    assert progress.steps[-1] == progress.steps[-2] == len(COLUMNS) * 2 * NUM - 1


@pytest.mark.slow
async def test_servers_of_ours_start_with_the_model_of_a_folder(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever is trained elsewhere: no endpoint for weights, no adapters, no sleep."""
    python, noted = tmp_path / "python", tmp_path / "started"
    python.write_text(PYTHON.format(noted=noted, root=ROOT, python=sys.executable))
    python.chmod(0o755)
    serve = ServeSettings(engine="vllm", tensor_parallel=2, options={"python": python})
    job = a_job(inputs, tmp_path / "out", serve, lora=LoraSettings())
    folder = inputs["terminal.rl"] / "model"
    async with open_finished(job, folder, "rl") as engine:
        made = await engine.generate(request("s", (9, 31, 77)))
    embedded = open_engine(folder, num_slots=1, context=LONG)
    assert made.ids == (await embedded.generate(request("s", (9, 31, 77)))).ids
    (line,) = noted.read_text().splitlines()
    assert line.startswith("dev= gpus=0,1 ")
    assert f"--model {folder} " in line
    assert "lora" not in line
    assert "sleep" not in line


@pytest.mark.slow
def test_what_was_lost_is_attempted_again_and_nothing_else(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    job = a_job(inputs, tmp_path / "out", ServeSettings())
    run(job)
    for column in COLUMNS:
        for mode in MODES:
            path = job.out / f"{column}.{mode}.terminal.jsonl"
            rows = list(read_lines(Rollout, path))
            if (column, mode) == ("sft", "sampled"):
                lost = replace(rows[0], outcome=Outcome.SANDBOX_FAILED)
                write_lines(path, [lost, rows[1]])
    before = {path: path.stat().st_size for path in job.out.glob("*.jsonl")}
    run(job)
    grown = [path.name for path, size in before.items() if path.stat().st_size > size]
    assert sorted(grown) == ["calls.jsonl", "sft.sampled.terminal.jsonl"]
    assert len(said(job.out, "sft", "sampled")) == NUM
