import os
import signal
import subprocess
import sys

import pytest

from katcore.sandbox.process import Process


def sleeper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_is_itself_after_a_trip_through_text() -> None:
    own = Process.of(os.getpid())
    assert Process.parse(str(own)) == own
    assert own.is_here
    assert own.is_alive


def test_one_that_has_the_pid_now_is_not_taken_for_it() -> None:
    with sleeper() as child:
        now = Process.of(child.pid)
        earlier = Process(now.kernel, now.pid, now.started - 1)
        assert not earlier.is_alive
        earlier.kill()
        assert now.is_alive
        now.kill()
        assert child.wait() == -signal.SIGKILL
    now.kill()


def test_a_zombie_is_dead() -> None:
    with sleeper() as child:
        process = Process.of(child.pid)
        process.kill()
        assert os.path.exists(f"/proc/{child.pid}")
        assert not process.is_alive
        process.kill()


def test_of_another_kernel_nothing_is_known() -> None:
    own = Process.of(os.getpid())
    assert not Process("another", own.pid, own.started).is_here


def test_a_pid_that_nobody_has() -> None:
    with pytest.raises(ProcessLookupError, match="no process"):
        Process.of(2**22 + 1)
