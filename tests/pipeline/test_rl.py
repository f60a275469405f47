"""Which tasks reinforcement learning attempts."""

from pathlib import Path
from typing import Any

import pytest

from kat_terminal.synthesizer import TerminalConfig, TerminalSynthesizer
from katcore.config import Preset, RlSettings
from katcore.errors import StageError
from katcore.pipeline.plan import StageSpec
from katcore.pipeline.rl import tasks_to_attempt
from katcore.pipeline.rollouts import tasks_of
from katcore.pipeline.stage import Job
from katcore.plugin import Plugins
from katcore.schema.codec import write_lines
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Verdict


@pytest.fixture
def root(tmp_path: Path) -> Path:
    synthesizer = TerminalSynthesizer(TerminalConfig(train=9, held_out=1))
    synthesizer.synthesize(tmp_path / "tasks", seed=0, report=lambda _: None)
    return tmp_path


def attempted(root: Path, num_seen: int, **settings: Any) -> tuple[list[str], list[str]]:
    """The ids of all tasks, and of those that a step is drawn from."""
    plugins = Plugins.installed()
    preset = Preset(name="p", summary="", rl=RlSettings(prompts=3, **settings))
    inputs = {"terminal.synthesize": root, "terminal.collect": root}
    spec = StageSpec("terminal.rl", "rl", "terminal")
    job = Job(spec, preset, 0, plugins, inputs, root, root, Any)  # type: ignore[arg-type]
    expert = plugins.experts()["terminal"]
    every = [task.id for task in tasks_of(job, expert, "train")]
    write_lines(
        root / "rollouts.jsonl",
        [
            Rollout(
                f"r{name}",
                name,
                "terminal",
                "g",
                0,
                Outcome.SCORED,
                Trajectory("t", ()),
                Verdict(1.0),
            )
            for name in every[:num_seen]
        ],
    )
    return every, [task.id for task in tasks_to_attempt(job, expert)]


def test_all_tasks_or_those_that_no_demonstration_gave_away(root: Path) -> None:
    every, chosen = attempted(root, 4)
    assert chosen == every
    every, chosen = attempted(root, 4, tasks="unseen")
    assert chosen == every[4:]


def test_too_few_that_are_unseen_are_said(root: Path) -> None:
    with pytest.raises(
        StageError, match="2 of 9 tasks have no demonstration, and a step attempts 3"
    ):
        attempted(root, 7, tasks="unseen")
