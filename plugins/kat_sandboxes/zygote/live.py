"""Judging a machine while it runs: who may go on, and the user that judges. Standard library only."""

import contextlib
import os
import signal
from collections.abc import Sequence

GRADER = 64999
"""Uid and gid of the grader. Of the agent's user it is all that a different uid can be: root without
capabilities can neither read its files nor signal, trace or become it."""
FOLDERS = ("/tests", "/logs")
"""Where only the grader has access."""


def check_folders() -> None:
    """Raise PermissionError unless the grader's folders are its own."""
    for folder in FOLDERS:
        if os.lstat(folder).st_uid != os.geteuid():
            raise PermissionError(f"{folder} is not the grader's")


def strays(services: Sequence[str]) -> dict[int, str]:
    """The processes of this user, but for this one, that run none of these programs; their names by pid."""
    kept = set(map(os.path.realpath, services))
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        pid = int(name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and is_alive(pid) and _user(pid) == os.geteuid():
                program = _program(pid)
                if program not in kept:
                    found[pid] = program or _name(pid)
    return found


def is_alive(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] not in {b"Z", b"X"}
    except OSError:
        return False


def end(services: Sequence[str]) -> dict[int, str]:
    """Kill all strays; their names by pid.

    They are stopped first, all in one call: a process with a signal before it cannot fork.
    """
    hold()
    try:
        found = strays(services)
        for pid in found:
            _signal(pid, signal.SIGKILL)
    finally:
        go_on()
    return found


def hold() -> None:
    """Stop all processes of this user but this one."""
    _signal(-1, signal.SIGSTOP)


def go_on() -> None:
    """Let them go on."""
    _signal(-1, signal.SIGCONT)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _user(pid: int) -> int:
    with open(f"/proc/{pid}/status", "rb") as file:
        return next(int(line.split()[2]) for line in file if line.startswith(b"Uid:"))


def _program(pid: int) -> str:
    """What it runs, or "" if that cannot be seen: then it has hidden itself."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def _name(pid: int) -> str:
    with open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read().strip()
