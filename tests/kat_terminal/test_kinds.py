"""Every kind: its demonstrations pass, doing nothing fails, and reading cannot be skipped."""

import asyncio
from pathlib import Path

import pytest

from kat_sandboxes.local import LocalBackend, LocalConfig
from kat_terminal.synthesizer import KINDS, TerminalConfig, TerminalSynthesizer
from katcore.dataset.harbor import HarborConfig, HarborDataset, demonstrations
from katcore.errors import TaskError
from katcore.protocols import SupportsChanges
from katcore.schema.rollout import Trajectory
from katcore.schema.task import Task
from katcore.verifier.state import TestScriptConfig as Config
from katcore.verifier.state import TestScriptVerifier as Verifier


def synthesized(root: Path, split: str, *, seed: int = 0, **options: object) -> list[Task]:
    config = TerminalConfig.model_validate({"train": 44, "held_out": 44, **options})
    TerminalSynthesizer(config).synthesize(root, seed=seed, report=lambda _: None)
    return list(HarborDataset(HarborConfig(root=root)).tasks(split))


def identity(task: Task) -> tuple[object, ...]:
    files = sorted(path for path in task.directory.rglob("*") if path.is_file())
    return tuple((path.relative_to(task.directory), path.read_bytes()) for path in files)


async def reward(backend: LocalBackend, task: Task, turns: tuple[str, ...]) -> float | None:
    async with backend.open(task.sandbox) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        for turn in turns:
            if turn != "submit":
                await sandbox.exec(["bash", "-c", turn])
        changes = await sandbox.changes()
    async with backend.open(task.sandbox) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await sandbox.apply(changes)
        return (await Verifier(Config()).verify(task, sandbox, Trajectory("s", ()))).reward


@pytest.mark.slow
async def test_oracles_pass_and_nothing_or_another_s_answer_does_not(tmp_path: Path) -> None:
    tasks = synthesized(tmp_path / "tasks", "train")
    assert {task.group for task in tasks} == set(KINDS)
    backend = LocalBackend(LocalConfig(images=tmp_path / "images"))
    for task in tasks:
        ways = demonstrations(task)
        assert len(ways) == 2
        found = await asyncio.gather(*(reward(backend, task, way.turns) for way in ways))
        assert found == [1.0, 1.0], task.id
        assert await reward(backend, task, ()) == 0.0, task.id
    for task in (task for task in tasks if task.traits["needs_reading"] == "true"):
        other = next(item for item in tasks if item.group == task.group and item.id != task.id)
        assert await reward(backend, task, demonstrations(other)[0].turns) == 0.0, task.id
    await backend.close()


def test_the_held_out_tasks_are_the_same_for_every_seed(tmp_path: Path) -> None:
    one = synthesized(tmp_path / "1", "held-out", seed=1)
    two = synthesized(tmp_path / "2", "held-out", seed=2)
    assert [task.id for task in one] == [task.id for task in two]
    assert list(map(identity, one)) == list(map(identity, two))


def test_training_tasks_are_others_and_depend_on_the_seed(tmp_path: Path) -> None:
    train = {task.prompt: identity(task) for task in synthesized(tmp_path / "1", "train", seed=1)}
    held_out = HarborDataset(HarborConfig(root=tmp_path / "1")).tasks("held-out")
    assert not {identity(task) for task in held_out} & set(train.values())
    other = {identity(task) for task in synthesized(tmp_path / "2", "train", seed=2)}
    assert other != set(train.values())


def test_half_of_the_tasks_need_reading(tmp_path: Path) -> None:
    tasks = synthesized(tmp_path, "train")
    assert sum(task.traits["needs_reading"] == "true" for task in tasks) == len(tasks) // 2


def test_an_unknown_kind_lists_the_known() -> None:
    with pytest.raises(TaskError, match="no terminal kind named 'x'; there are: make_folder"):
        TerminalSynthesizer(TerminalConfig(kinds=("x",)))
