"""One stage: skipped when finished, resumed when killed, whole or not there at all."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from katcore.config import Preset
from katcore.errors import ConfigError, StageError
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.stage import Job, finished, run_stage, stage_path
from katcore.plugin import Plugins

PLAN = Plan(
    Preset(name="p", summary=""),
    0,
    (),
    {
        "first": StageSpec("first", "faked"),
        "second": StageSpec("second", "faked", inputs=("first",)),
    },
    {"first": "k1", "second": "k2"},
)
NONE = Plugins({})


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))


Install = Callable[[Callable[[Job], dict[str, float]]], list[str]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a function the stage `faked`; returns the ids it was run for."""

    def make(function: Callable[[Job], dict[str, float]]) -> list[str]:
        ran: list[str] = []

        def run(job: Job) -> dict[str, float]:
            ran.append(job.spec.id)
            return function(job)

        module = ModuleType("katcore.pipeline.faked")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "katcore.pipeline.faked", module)
        return ran

    return make


def writes(job: Job) -> dict[str, float]:
    (job.out / "sub").mkdir(exist_ok=True)
    (job.out / "sub" / "file").write_text("content")
    return {"loss": 0.5}


def test_a_finished_stage_is_skipped(install: Install) -> None:
    ran = install(writes)
    first, again = (run_stage(PLAN, "first", NONE) for _ in range(2))
    assert ran == ["first"]
    assert (first.is_skipped, again.is_skipped) == (False, True)
    assert again.metrics == first.metrics == {"loss": 0.5}
    assert (first.path / "sub" / "file").read_text() == "content"
    assert not first.path.with_name("k1.work").exists()


def test_its_manifest_names_every_file(install: Install) -> None:
    install(writes)
    path = run_stage(PLAN, "first", NONE).path
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert set(manifest["files"]) == {"sub/file"}
    assert manifest["files"]["sub/file"]["bytes"] == len("content")
    assert (manifest["key"], manifest["seed"], manifest["preset"]) == ("k1", 0, "p")


def test_an_input_has_to_be_there(install: Install) -> None:
    ran = install(lambda job: {"n": float(len(job.inputs))})
    with pytest.raises(StageError, match="second needs first, not made yet"):
        run_stage(PLAN, "second", NONE)
    run_stage(PLAN, "first", NONE)
    assert run_stage(PLAN, "second", NONE).metrics == {"n": 1.0}
    assert ran == ["first", "second"]


def test_an_unknown_stage_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no stage 'third' in this run; it has: first, second"):
        run_stage(PLAN, "third", NONE)


@pytest.mark.parametrize("harm", ["longer", "gone"])
def test_a_finished_folder_that_was_changed_is_an_error(install: Install, harm: str) -> None:
    install(writes)
    file = run_stage(PLAN, "first", NONE).path / "sub" / "file"
    if harm == "gone":
        file.unlink()
    else:
        file.write_text("content and more")
    with pytest.raises(StageError, match="not as its manifest says"):
        run_stage(PLAN, "first", NONE)


def test_a_stage_that_fails_leaves_nothing_finished(install: Install) -> None:
    def fails(job: Job) -> dict[str, float]:
        writes(job)
        raise RuntimeError("half way")

    install(fails)
    with pytest.raises(RuntimeError):
        run_stage(PLAN, "first", NONE)
    assert finished(stage_path(PLAN, "first")) is None
    install(writes)
    assert not run_stage(PLAN, "first", NONE).is_skipped


def test_a_manifest_left_by_a_killed_publication_is_no_output(install: Install) -> None:
    work = stage_path(PLAN, "first").with_name("k1.work")
    (work / "out").mkdir(parents=True)
    (work / "out" / "manifest.json").write_text("{}")
    install(writes)
    run_stage(PLAN, "first", NONE)
    assert run_stage(PLAN, "first", NONE).is_skipped


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_what_to_do(install: Install, number: int) -> None:
    def fills(job: Job) -> dict[str, float]:
        if number == errno.ENOSPC:
            with open("/dev/full", "w") as file:
                file.write("x")
        raise OSError(number, os.strerror(number))

    install(fills)
    with pytest.raises(StageError, match=r"disk is full .* make room and run the same command"):
        run_stage(PLAN, "first", NONE)


def test_another_error_of_the_system_stays_what_it_is(install: Install) -> None:
    def fails(job: Job) -> dict[str, float]:
        raise PermissionError("no")

    install(fails)
    with pytest.raises(PermissionError):
        run_stage(PLAN, "first", NONE)


_CHILD = """
import sys, time
from types import ModuleType
from katcore.pipeline.stage import run_stage
from tests.pipeline.test_stage import NONE, PLAN

def run(job):
    seen = job.work / "checkpoint"
    if seen.exists():
        (job.out / "resumed").write_text("yes")
        return {"resumed": 1.0}
    (job.out / "begun").write_text("yes")
    seen.write_text("1")
    print("half", flush=True)
    time.sleep(60)

module = ModuleType("katcore.pipeline.faked")
module.run = run
sys.modules["katcore.pipeline.faked"] = module
run_stage(PLAN, "first", NONE)
print("done", flush=True)
"""


def start() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True)


def test_killed_with_9_the_same_command_goes_on_and_meanwhile_it_is_locked(
    install: Install,
) -> None:
    process = start()
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    install(writes)
    with pytest.raises(StageError, match="first is being run by another process"):
        run_stage(PLAN, "first", NONE)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert finished(stage_path(PLAN, "first")) is None
    again = start()
    assert again.communicate(timeout=60)[0] == "done\n"
    found = finished(stage_path(PLAN, "first"))
    assert found
    assert found.metrics == {"resumed": 1.0}
    assert {path.name for path in found.path.iterdir()} == {"begun", "resumed", "manifest.json"}
