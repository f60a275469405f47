"""What a backend that was killed left on this machine, found by its mark.

Its server and its sandboxes die with it by themselves: the kernel signals a process whose parent is gone, and
the first process of a sandbox ends when nobody is at the other end. Who is left all the same is killed here.
What never goes by itself are cgroups, snapshots, and images that were being built. The root folders of
sandboxes are in memory, and go with their processes.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from kat_sandboxes.zygote import cgroups
from katcore.errors import SandboxError
from katcore.sandbox.image import BUILDING
from katcore.sandbox.process import Process

SNAPSHOT = "snapshot-"
"""How the name of a layer begins that is a snapshot; the mark of who made it comes next."""
_PATIENCE_S = 10.0
_RETRY_S = 0.02


def sweep(mark: str, images: Path) -> None:
    """Remove all of it.

    Raises:
        SandboxError: something resists.
    """
    until_s = time.monotonic() + _PATIENCE_S
    while found := list(_marked(mark)):
        for process in found:
            process.kill()
        if time.monotonic() > until_s:
            raise SandboxError(f"processes of {mark} come again and again: {found[0].pid}")
    for group in _groups(mark):
        _remove_group(group, until_s)
    snapshots = images.glob(f"layers/{SNAPSHOT}{mark}-*")
    for unfinished in (*images.glob(f"{BUILDING}{mark}-*"), *snapshots):
        shutil.rmtree(unfinished, ignore_errors=True)


def _marked(mark: str) -> Iterator[Process]:
    """The server, and what was forked from it without another program: the first process of each sandbox."""
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            process = Process.of(int(name))
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if words[1:3] == [b"-S", b"-c"] and words[-2] == mark.encode() and process.is_alive:
                yield process


def _groups(mark: str) -> Iterator[Path]:
    """Wherever in a hierarchy they are: that depended on where the process was that made them."""
    for place in cgroups.PLACES:
        for folder, names, _ in os.walk(place):
            if mark in names:
                yield Path(folder, mark)
            names[:] = [name for name in names if not name.startswith("katcore-")]


def _remove_group(group: Path, until_s: float) -> None:
    """A group of which the last process was just killed is busy for a moment."""
    while True:
        try:
            for child in group.iterdir():
                if child.is_dir():
                    child.rmdir()
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if time.monotonic() > until_s:
                raise SandboxError(f"{group} cannot be removed: {error.strerror}") from error
            time.sleep(_RETRY_S)
        else:
            return
