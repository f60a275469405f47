import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from katcore.config import Preset, environment
from katcore.errors import StageError
from katcore.pipeline import child
from katcore.pipeline.local import log_path
from katcore.pipeline.plan import Plan, StageSpec

PLAN = Plan(
    Preset(name="any", summary=""), 0, (), {"base": StageSpec("base", "base")}, {"base": "0"}
)
PARENT = """
import sys
from katcore.pipeline import child
from tests.pipeline.test_child import PLAN
child.stage_command = lambda *_: [sys.executable, "-c", "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"]
child.run_child(PLAN, "base", "any", "run-1")
"""  # noqa: E501


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))


def commands(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(child, "stage_command", lambda *_: [sys.executable, "-c", code])


def test_the_last_line_is_the_uri_and_the_rest_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commands(
        monkeypatch,
        "import os, sys; print('chatter'); print('file:///made'); print('base: done', file=sys.stderr);"
        "print(os.environ['KATCORE_RUN'], file=sys.stderr)",
    )
    with caplog.at_level(logging.INFO):
        assert child.run_child(PLAN, "base", "any", "run-1") == "file:///made"
    assert caplog.messages == ["base: done", "run-1"]
    assert Path(log_path(PLAN, "base")).read_text() == "base: done\nrun-1\n"


def test_a_failure_says_its_last_words_and_where_its_log_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands(monkeypatch, "import sys; sys.exit('error: no such thing')")
    with pytest.raises(StageError) as caught:
        child.run_child(PLAN, "base", "any", "run-1")
    assert "stage base exited with 1: error: no such thing" in str(caught.value)
    assert log_path(PLAN, "base") in str(caught.value)


def test_a_stage_that_another_process_runs_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child, "_BUSY_POLL_S", 0.01)
    flag = tmp_path / "flag"
    commands(
        monkeypatch,
        f"import pathlib, sys; flag = pathlib.Path({str(flag)!r});"
        "was = flag.exists(); flag.touch(); print('uri'); sys.exit(0 if was else 75)",
    )
    assert child.run_child(PLAN, "base", "any", "run-1") == "uri"


def test_the_stage_ends_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=root,
        env={**environment(), "PYTHONPATH": str(root)},
        start_new_session=True,
    ) as worker:
        log = Path(log_path(PLAN, "base"))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.05)
        stage = int(log.read_text())
        # Airflow signals the group of a task that is cancelled: the stage has to be in it.
        assert os.getpgid(stage) == worker.pid
        os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(stage):
        time.sleep(0.05)
    assert not _runs(stage)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
