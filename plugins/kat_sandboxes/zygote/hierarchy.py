"""Where in the one hierarchy of cgroups v2 this process may make groups. Standard library only.

A group that limits what is in its subgroups has no processes of its own, but for the root of the machine. So
the place is the nearest folder above this process that has none. Where none can be written to, as in
a container, and where our own group was left to us, as to a service with `Delegate=yes`, the processes of our
own group are moved into a subgroup first.
"""

import contextlib
import os
from collections.abc import Iterator

BASE = "/sys/fs/cgroup"
LEAF = "katcore"
"""The subgroup to which the processes of a delegated group are moved."""
_ATTEMPTS = 10
_DELEGATED = ("user.delegate", "trusted.delegate")
"""How systemd marks what it leaves to others."""


def is_unified() -> bool:
    """Whether the machine has cgroups v2 alone."""
    return os.path.exists(f"{BASE}/cgroup.controllers")


def own() -> str:
    """The group of this process, as a path in the hierarchy."""
    with open("/proc/self/cgroup") as lines:
        return next((line[3:].strip() for line in lines if line.startswith("0::")), "/")


def above(path: str) -> list[str]:
    """The folder of a group, and all above it. Only the last where the group cannot be seen from here."""
    folder = BASE + path.rstrip("/")
    if "/.." in path or not os.path.isdir(folder):
        return [BASE]
    found = [folder]
    while folder != BASE:
        folder = os.path.dirname(folder)
        found.append(folder)
    return found


def make(name: str, wanted: tuple[str, ...], near: str) -> str:
    """A group of this name, whose subgroups these controllers can limit. `near` is where this process is.

    Raises:
        OSError: there is no place for it; why not at the nearest.
    """
    failure: OSError | None = None
    for folder in _places(above(near)):
        try:
            return _make(folder, name, wanted)
        except OSError as error:
            failure = failure or error
    assert failure
    raise failure


def check(folder: str) -> None:
    """Raise OSError unless processes may be moved below a folder: a right where their paths part."""
    os.close(os.open(f"{folder}/cgroup.procs", os.O_WRONLY))


def controllers(folder: str) -> list[str]:
    """Those that can limit the subgroups of a folder."""
    return read(f"{folder}/cgroup.controllers").split()


def enable(folder: str, wanted: tuple[str, ...]) -> None:
    """Have controllers limit the subgroups of a folder."""
    path = f"{folder}/cgroup.subtree_control"
    missing = [name for name in wanted if name not in read(path).split()]
    if missing:
        write(path, " ".join(f"+{name}" for name in missing))


def read(path: str) -> str:
    """What a file of the kernel's says."""
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    """Tell the kernel."""
    with open(path, "w") as file:
        file.write(text)


def _places(folders: list[str]) -> Iterator[str]:
    if _is_delegated(folders[0]):
        yield folders[0]
    yield from filter(_may_have_groups, folders)
    yield folders[0]


def _may_have_groups(folder: str) -> bool:
    is_machine = not os.path.exists(f"{folder}/cgroup.type")
    return is_machine or not read(f"{folder}/cgroup.procs")


def _is_delegated(folder: str) -> bool:
    for mark in _DELEGATED:
        with contextlib.suppress(OSError):
            return os.getxattr(folder, mark) == b"1"
    return False


def _make(folder: str, name: str, wanted: tuple[str, ...]) -> str:
    check(folder)
    if missing := set(wanted) - set(controllers(folder)):
        raise FileNotFoundError(f"{folder} lacks the controllers: {', '.join(sorted(missing))}")
    if not _may_have_groups(folder):
        _move_down(folder)
    enable(folder, wanted)
    made = f"{folder}/{name}"
    os.makedirs(made, exist_ok=True)
    enable(made, wanted)
    return made


def _move_down(folder: str) -> None:
    """Move its processes into a subgroup. Some may start others meanwhile."""
    os.makedirs(f"{folder}/{LEAF}", exist_ok=True)
    for _ in range(_ATTEMPTS):
        for pid in read(f"{folder}/cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                write(f"{folder}/{LEAF}/cgroup.procs", pid)
