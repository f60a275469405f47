"""All stages without Airflow: shell scripts in place of stages, and what is left of them afterwards."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from katcore.config import Preset
from katcore.errors import StageError
from katcore.pipeline import local
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.stage import stage_path

INPUTS = {
    "base": (),
    "left": ("base",),
    "right": ("base",),
    "third": ("base",),
    "last": ("left", "right", "third"),
}
PLAN = Plan(
    Preset(name="p", summary=""),
    0,
    (),
    {name: StageSpec(name, "faked", inputs=inputs) for name, inputs in INPUTS.items()},
    dict.fromkeys(INPUTS, "k"),
)


class Stages:
    """Runs the plan with a script per stage; one that has none says its name as it begins and ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scripts: dict[str, str] = {}
        self.ticks: list[tuple[str, ...]] = []

    def command(self, plan: Plan, name: str, preset: str) -> list[str]:
        trace = self.folder / "trace"
        done = f"echo +{name} >> {trace}; sleep 0.1; echo -{name} >> {trace}"
        return ["sh", "-c", self.scripts.get(name, done)]

    def run(self, tick: Callable[[], None] = lambda: None) -> None:
        def told(running: Sequence[str]) -> None:
            self.ticks.append(tuple(running))
            tick()

        local.run_all(PLAN, "p", told)

    def trace(self) -> list[str]:
        path = self.folder / "trace"
        return path.read_text().split() if path.exists() else []

    def pid(self, name: str) -> int:
        """What a script wrote into a file of that name; 0 so far."""
        path = self.folder / name
        return int(path.read_text() or 0) if path.exists() else 0


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(local, "_POLL_S", 0.02)
    made = Stages(tmp_path)
    monkeypatch.setattr(local, "stage_command", made.command)
    return made


def finish(name: str) -> None:
    folder = stage_path(PLAN, name)
    folder.mkdir(parents=True)
    manifest = {"files": {}, "seconds": 1.0, "metrics": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def ends(pid: int) -> bool:
    """Whether a process is gone, soon; a zombie is."""
    assert pid
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_every_stage_comes_after_its_inputs(stages: Stages) -> None:
    stages.run()
    trace = stages.trace()
    assert sorted(trace) == sorted(f"{sign}{name}" for name in INPUTS for sign in "+-")
    for name, inputs in INPUTS.items():
        for needed in inputs:
            assert trace.index(f"-{needed}") < trace.index(f"+{name}")


def test_no_more_than_two_run_at_once(stages: Stages) -> None:
    stages.run()
    running, most = 0, 0
    for line in stages.trace():
        running += 1 if line[0] == "+" else -1
        most = max(most, running)
    assert most <= 2
    assert max(map(len, stages.ticks)) == 2, "and two do: three are ready after the first"
    assert stages.ticks[0] == ("base",)
    assert stages.ticks[-1] == ()


def test_what_is_finished_is_not_run_again(stages: Stages) -> None:
    for name in ("base", "left", "right"):
        finish(name)
    stages.run()
    assert stages.trace() == ["+third", "-third", "+last", "-last"]


def test_with_all_finished_nothing_starts(stages: Stages) -> None:
    for name in INPUTS:
        finish(name)
    stages.run()
    assert stages.trace() == []
    assert stages.ticks == [()]


def test_a_failure_names_stage_and_log_and_stops_the_rest(stages: Stages) -> None:
    pid = stages.folder / "pid"
    stages.scripts["left"] = (
        f"until [ -s {pid} ]; do sleep 0.02; done; echo chatter; echo what went wrong >&2; exit 3"
    )
    stages.scripts["right"] = f"echo $$ > {pid}; exec sleep 300"
    with pytest.raises(StageError) as caught:
        stages.run()
    said = str(caught.value)
    log = local.log_path(PLAN, "left")
    assert said.startswith("stage left exited with 3: what went wrong\n")
    assert log in said
    assert "run the same command" in said
    assert Path(log).read_text() == "chatter\nwhat went wrong\n"
    assert ends(stages.pid("pid"))
    assert stages.trace() == ["+base", "-base"], "neither the third nor the last began"


def test_a_stage_that_says_nothing_is_named_too(stages: Stages) -> None:
    stages.scripts["base"] = "exit 1"
    with pytest.raises(StageError, match="stage base exited with 1: no output"):
        stages.run()


def test_a_killed_stage_is_told_by_its_signal_and_leaves_no_child(stages: Stages) -> None:
    stages.scripts["base"] = f"sleep 300 & echo $! > {stages.folder / 'child'}; kill -9 $$"
    with pytest.raises(StageError, match="stage base was killed by signal 9"):
        stages.run()
    assert ends(stages.pid("child"))


@pytest.mark.parametrize(
    "child",
    ["sleep 300", "(trap '' TERM; exec sleep 300)"],
    ids=["obeys", "ignores the signal"],
)
def test_an_interruption_ends_whole_groups(stages: Stages, child: str) -> None:
    for name in ("left", "right"):
        stages.scripts[name] = f"{child} & echo $! > {stages.folder / name}; wait"

    def interrupt() -> None:
        if stages.pid("left") and stages.pid("right"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(interrupt)
    assert ends(stages.pid("left"))
    assert ends(stages.pid("right"))


def test_a_stage_that_does_not_stop_when_asked_is_killed(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_STOP_S", 0.1)
    stages.scripts["base"] = f"trap '' TERM; echo $$ > {stages.folder / 'pid'}; exec sleep 300"

    def interrupt() -> None:
        if stages.pid("pid"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(interrupt)
    assert ends(stages.pid("pid"))


def test_a_pipeline_that_is_killed_takes_its_stages_along(stages: Stages) -> None:
    stages.scripts["base"] = f"echo $$ > {stages.folder}/base; exec sleep 60"
    pipeline = os.fork()
    if pipeline == 0:
        try:
            stages.run()
        finally:
            os._exit(1)
    while not stages.pid("base"):
        time.sleep(0.02)
    os.kill(pipeline, signal.SIGKILL)
    os.waitpid(pipeline, 0)
    assert ends(stages.pid("base"))


def test_each_run_adds_to_the_log(stages: Stages) -> None:
    stages.scripts["base"] = "echo again; exit 1"
    for _ in range(2):
        with pytest.raises(StageError):
            stages.run()
    assert Path(local.log_path(PLAN, "base")).read_text() == "again\nagain\n"


def test_a_stage_s_command_names_its_whole_run() -> None:
    stages = {
        "base": StageSpec("base", "base"),
        "swe.rl": StageSpec("swe.rl", "rl", "swe"),
    }
    plan = Plan(Preset(name="p", summary=""), 5, ("swe", "terminal"), stages, {})
    shared = ["--preset", "own.yaml", "--seed", "5", "--experts", "swe,terminal"]
    assert local.stage_command(plan, "base", "own.yaml")[3:] == ["base", *shared]
    assert local.stage_command(plan, "swe.rl", "own.yaml")[3:] == ["rl", *shared, "--expert", "swe"]
