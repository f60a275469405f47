import subprocess
import sys
from pathlib import Path

import pytest

from katcore.config import environment
from katcore.service import control, process, state
from katcore.service.layout import Layout

STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
)
TREE = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def start(code: str, *arguments: str, mark: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment(), process.MARK: mark},
        start_new_session=True,
    )


def find(mark: str) -> list[int]:
    return [found.pid for found in process.marked(process.MARK, mark)]


def test_a_tree_that_ignores_signals_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_GRACE_S", 0.5)
    mark = str(tmp_path)
    with start(TREE, STUBBORN, mark=mark) as root:
        assert root.stdout
        root.stdout.readline()
        assert len(find(mark)) == 2
        root.kill()
        assert process.end(lambda: process.marked(process.MARK, mark)) >= 1
    assert find(mark) == []


def test_others_are_left_alone(tmp_path: Path) -> None:
    with start("input()", mark=str(tmp_path / "other")) as other:
        assert process.end(lambda: process.marked(process.MARK, str(tmp_path))) == 0
        assert other.poll() is None
        other.kill()


def test_down_ends_what_a_killed_supervisor_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    layout = Layout(tmp_path)
    layout.services.mkdir()
    layout.lock.touch()
    with start("import time; print(1, flush=True); time.sleep(60)", mark=str(tmp_path)) as left:
        assert left.stdout
        left.stdout.readline()
        state.write(layout, state.State(pid=1, airflow_port=1, mlflow_port=2, is_ready=True))
        assert not state.is_alive(layout)
        assert control.down() == 1
        assert find(str(tmp_path)) == []
    assert not layout.state.exists()
    assert control.down() == 0


def test_down_where_nothing_ever_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "none"))
    assert control.down() == 0
    assert not (tmp_path / "none").exists()
