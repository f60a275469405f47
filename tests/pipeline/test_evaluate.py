"""Every model, mode and seed is measured on the same held-out tasks."""

from pathlib import Path
from typing import Any

from kat_terminal.synthesizer import TerminalConfig, TerminalSynthesizer
from katcore.config import EvaluateSettings, Preset
from katcore.pipeline.evaluate import held_out
from katcore.pipeline.plan import StageSpec
from katcore.pipeline.stage import Job
from katcore.plugin import Plugins


def test_sampled_tasks_are_some_of_the_greedy_ones_for_every_seed(tmp_path: Path) -> None:
    synthesizer = TerminalSynthesizer(TerminalConfig(train=1, held_out=9))
    synthesizer.synthesize(tmp_path / "tasks", seed=0, report=lambda _: None)
    plugins = Plugins.installed()
    expert = plugins.experts()["terminal"]
    preset = Preset(name="p", summary="", evaluate=EvaluateSettings(tasks=7, sampled_tasks=4))
    spec, progress = StageSpec("terminal.evaluate", "evaluate", "terminal"), Any
    found = []
    for seed in (0, 1):
        inputs = {"terminal.synthesize": tmp_path}
        job = Job(spec, preset, seed, plugins, inputs, tmp_path, tmp_path, progress)  # type: ignore[arg-type]
        found.append(
            [[task.id for task in held_out(job, expert, mode)] for mode in ("greedy", "sampled")]
        )
    assert found[0] == found[1]
    greedy, sampled = found[0]
    assert (len(greedy), len(sampled)) == (7, 4)
    assert set(sampled) < set(greedy)
