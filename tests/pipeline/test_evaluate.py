"""Every model, mode and seed is measured on the same held-out tasks."""

from pathlib import Path
from typing import Any

from kat_terminal.synthesizer import TerminalConfig, TerminalSynthesizer
from katcore.config import EvaluateSettings, Preset
from katcore.pipeline.evaluate import held_out
from katcore.pipeline.plan import MODES, StageSpec
from katcore.pipeline.stage import Job
from katcore.plugin import Plugins


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
