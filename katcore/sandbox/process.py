"""Naming a process so that no other is ever taken for it.

Pids are used again, so the time it started goes with it; and they count within one boot and one pid
namespace, so that goes with it too. Whether a process of another kernel lives cannot be told from here.
"""

import os
import select
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from katcore.errors import SandboxError

_STATE, _STARTED = 0, 19
"""Where they are in /proc/<pid>/stat, after the name."""


@cache
def kernel() -> str:
    """This boot of this machine, and the pid namespace one is in."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"


@dataclass(frozen=True, slots=True)
class Process:
    """One process, for good. Its text is what `parse` reads."""

    kernel: str
    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that has this pid now.

        Raises:
            ProcessLookupError: none has.
        """
        return cls(kernel(), pid, int(_stat(pid)[_STARTED]))

    @classmethod
    def parse(cls, text: str) -> "Process":
        """What `str` gave."""
        where, pid, started = text.split(":")
        return cls(where, int(pid), int(started))

    def __str__(self) -> str:
        return f"{self.kernel}:{self.pid}:{self.started}"

    @property
    def is_here(self) -> bool:
        """Whether one can tell from here if it lives."""
        return self.kernel == kernel()

    @property
    def is_alive(self) -> bool:
        """Whether it runs. A zombie does not: all that is left of it is its exit code."""
        try:
            found = _stat(self.pid)
        except ProcessLookupError:
            return False
        return int(found[_STARTED]) == self.started and found[_STATE] not in "ZX"

    def kill(self, timeout_s: float = 10.0) -> None:
        """SIGKILL, then wait until it is dead. One that is dead already is fine.

        Raises:
            SandboxError: it does not die, as one that waits for a dead disk.
        """
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # The descriptor keeps its pid from being used again between this look and the signal.
            if not self.is_alive:
                return
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            ended = select.poll()
            ended.register(descriptor, select.POLLIN)
            if not ended.poll(timeout_s * 1000):
                raise SandboxError(f"process {self.pid} does not die within {timeout_s:g} s")
        except ProcessLookupError:
            return
        finally:
            os.close(descriptor)


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    return text.rpartition(")")[2].split()
