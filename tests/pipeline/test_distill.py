"""The beginning off policy: what it learns from, and that a killed one goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from katcore.config import DistillSettings, ModelSettings, Preset
from katcore.errors import StageError
from katcore.inference.chat import ChatTokenizer
from katcore.pipeline import lineage
from katcore.pipeline.distill import Domain, _Loop, _shape, _warn_of_strangers, check_teacher
from katcore.pipeline.lineage import ancestors
from katcore.pipeline.plan import StageSpec
from katcore.pipeline.rollouts import RolloutFile
from katcore.pipeline.stage import Job
from katcore.plugin import Plugins
from katcore.schema.call import Message
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Turn, Verdict
from katcore.settings import ScaleSettings
from katcore.train.policy import load_policy, save_policy
from katcore.train.prepare import load_trainable
from katcore.train.trainer import Schedule, Trainer
from tests.inference.tiny import CONTEXT, write_tiny_model

STEPS = 14
LR = 1e-2
SETTINGS = DistillSettings(
    objective="reverse-kl",
    cold_steps=STEPS,
    cold_batch=3,
    cold_objective="kl",
    steps=1,
    lr=LR,
    checkpoint_every=5,
)


class KilledError(Exception):
    pass


class Progress:
    def __init__(self, stop_at: int | None) -> None:
        self._stop_at = stop_at
        self.kl: list[float] = []
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        assert steps == STEPS + 1
        if step == self._stop_at:
            raise KilledError
        self.kl.append(metrics["kl"])


def rollout(number: int, reward: float) -> Rollout:
    ids = tuple(3 + (number * 7 + at) % 200 for at in range(9))
    turn = Turn(-1, 0, 0, ids[:3], ids[3:], (-0.5,) * 6, (Message("user", "x"),), "ls", "0")
    name = f"r{number}"
    trajectory = Trajectory(name, (turn,))
    return Rollout(name, name, "terminal", "g", 0, Outcome.SCORED, trajectory, Verdict(reward))


def job(root: Path, rewards: list[float], *, stop_at: int | None = None, zero: Any = 0) -> Job:
    """Student and teacher are two tiny models with one tokenizer."""
    inputs = {name: root / name for name in ("unified.sft", "terminal.rl")}
    if not inputs["terminal.rl"].exists():
        for folder in inputs.values():
            write_tiny_model(folder / "model")
        teacher = load_policy(inputs["terminal.rl"] / "model")
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        save_policy(teacher, inputs["terminal.rl"] / "model", tokenizer=root)
        file = RolloutFile(inputs["terminal.rl"] / "rollouts.jsonl")
        for number, reward in enumerate(rewards):
            file.append(rollout(number, reward))
        file.close()
    model, scale = ModelSettings(context=CONTEXT), ScaleSettings(zero=zero)
    preset = Preset(name="p", summary="", model=model, distill=SETTINGS, scale=scale)
    spec = StageSpec("unified.distill", "distill", inputs=tuple(inputs))
    progress: Any = Progress(stop_at)
    return Job(spec, preset, 0, Plugins.installed(), inputs, root, root, progress)


def domain(made: Job) -> Domain:
    expert = made.plugins.experts()["terminal"]
    late = made.input("terminal.rl") / "rollouts.jsonl"
    return Domain(expert, [], made.input("terminal.rl") / "model", SETTINGS, late)


def begin(made: Job) -> Trainer:
    start = made.input("unified.sft") / "model"
    model = load_trainable(start, made.preset, 0)
    trainer = Trainer(model, Schedule(LR, STEPS + 1), scale=made.preset.scale)
    loop = _Loop(made, trainer, ChatTokenizer(start), [domain(made)])
    assert loop.load() == []
    loop.learn_from_teachers()
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.flatten() for _, weight in sorted(trainer.weights().items())])


def test_it_comes_closer_to_the_teacher_and_a_killed_one_ends_alike(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    rewards = [0.0, 1.0] * 6
    whole = job(tmp_path, rewards)
    trainer = begin(whole)
    progress: Any = whole.progress
    assert trainer.step_number == STEPS
    assert progress.kl[-1] < 0.8 * progress.kl[0]
    cut = tmp_path / "cut"
    with pytest.raises(KilledError):
        begin(job(cut, rewards, stop_at=11))
    assert torch.equal(weights(begin(job(cut, rewards))), weights(trainer))


def test_what_teachers_said_is_learnt_as_the_settings_say(tmp_path: Path) -> None:
    made = job(tmp_path, [1.0])
    start = made.input("unified.sft") / "model"
    trainer = Trainer(load_trainable(start, made.preset, 0), Schedule(LR, 1))
    loop = _Loop(made, trainer, ChatTokenizer(start), [domain(made)])
    kinds = []
    for changes in ({}, {"cold_objective": "kl"}, {"cold_objective": "kl", "objective": "top-k"}):
        loop._settings = DistillSettings.model_validate(changes)
        loop._shape = _shape(loop._settings)
        kinds.append(loop._cold_shape().kind)
    assert kinds == ["likelihood", "reverse-kl", "top-k"]


def test_scattered_teachers_teach_as_whole_ones(tmp_path: Path) -> None:
    found = []
    for zero in (0, 3):
        (tmp_path / str(zero)).mkdir()
        made = job(tmp_path / str(zero), [0.0, 1.0] * 6, zero=zero)
        begin(made)
        progress: Any = made.progress
        found.append(progress.kl)
    assert len(found[0]) == STEPS
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_teacher_without_a_rollout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="left no scored rollout"):
        begin(job(tmp_path, []))


def test_a_teacher_has_to_read_as_the_student_does(tmp_path: Path) -> None:
    made = job(tmp_path, [1.0])
    start, teacher = made.input("unified.sft") / "model", domain(made)
    check_teacher(start, ChatTokenizer(start), teacher)
    settings = json.loads((teacher.model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    (teacher.model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(StageError, match=r"differs from the student .* in its chat template"):
        check_teacher(start, ChatTokenizer(start), teacher)


def test_a_foreign_teacher_is_said_and_no_model_is_read_twice(tmp_path: Path) -> None:
    made = job(tmp_path, [1.0])
    start, teacher = made.input("unified.sft") / "model", domain(made)
    before = lineage._digest.cache_info().misses
    _warn_of_strangers(made, start, [teacher] * 3)
    progress: Any = made.progress
    assert len(progress.warnings) == 3
    assert "not known to come from one model" in progress.warnings[0]
    assert lineage._digest.cache_info().misses == before + 2
    (teacher.model.parent / "manifest.json").write_text(
        json.dumps({"ancestors": sorted(ancestors(start))})
    )
    _warn_of_strangers(made, start, [teacher])
    assert len(progress.warnings) == 3
    with (start / "model.safetensors").open("ab") as file:
        file.write(b"x")
    _warn_of_strangers(made, start, [teacher])
    assert len(progress.warnings) == 4, "the hash of weights that changed is another"
