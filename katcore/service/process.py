"""Finding and ending processes by a mark in their environment.

A mark survives what a note of process ids does not: the death of whoever wrote the note, restarts, and
processes that the services start themselves.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import psutil

MARK = "KATCORE_SERVICES"
"""Environment variable of the supervisor and all that it starts; its value is katcore's home."""

_GRACE_S = 6.0
_PATIENCE_S = 30.0


def marked(name: str, value: str) -> list[psutil.Process]:
    """The running processes whose environment has `name=value`, but for this one and its parents."""
    found = []
    own = psutil.Process()
    spared = {own.pid, *(parent.pid for parent in own.parents())}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid not in spared and process.environ().get(name) == value:
                found.append(process)
    return found


def end(find: Callable[[], Iterable[psutil.Process]]) -> int:
    """End what `find` finds, gently first, until it finds nothing; returns how many there were."""
    started_s, ended = time.monotonic(), set()
    while found := list(find()):
        age_s = time.monotonic() - started_s
        if age_s > _PATIENCE_S:
            break
        for process in found:
            with suppress(psutil.Error):
                if process.pid not in ended or age_s > _GRACE_S:
                    process.kill() if age_s > _GRACE_S else process.terminate()
            ended.add(process.pid)
        psutil.wait_procs(found, timeout=0.5)
    return len(ended)
