"""Limits of memory and processes: cgroups of either version, where this process may make them.

Folders are recycled: making and removing one costs as much as the rest of a sandbox.
"""

import contextlib
import os
from dataclasses import dataclass, field

_BASE = "/sys/fs/cgroup"
PLACES = (_BASE,) if os.path.isdir(_BASE) else ()
"""Folders that the process which manages groups has to see."""


@dataclass
class Groups:
    """A stock of cgroups under one parent. `kind` is "v2", "v1" or "none"."""

    kind: str
    parents: dict[str, str] = field(default_factory=dict)
    _free: list[str] = field(default_factory=list)
    _limits: dict[str, tuple[int, int]] = field(default_factory=dict)
    _num_made: int = 0
    _kills: dict[str, int] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str) -> "Groups":
        """Make a parent group called `name`, or none where that is not allowed."""
        if os.path.exists(f"{_BASE}/cgroup.controllers"):
            parents, kind = {"memory": f"{_BASE}/{name}", "pids": f"{_BASE}/{name}"}, "v2"
        else:
            parents = {item: f"{_BASE}/{item}/{name}" for item in ("memory", "pids")}
            kind = "v1"
        try:
            for parent in dict.fromkeys(parents.values()):
                os.makedirs(parent, exist_ok=True)
            if kind == "v2":
                for folder in (_BASE, parents["memory"]):
                    _write(f"{folder}/cgroup.subtree_control", "+memory +pids")
        except OSError:
            return cls("none")
        return cls(kind, parents)

    def take(self, memory_mib: int, max_processes: int) -> str:
        """A group with these limits."""
        if self.kind == "none":
            return ""
        name = self._free.pop() if self._free else self._make()
        if self._limits.get(name) != (memory_mib, max_processes):
            memory, pids = self.parents["memory"], self.parents["pids"]
            limit = "memory.max" if self.kind == "v2" else "memory.limit_in_bytes"
            _write(f"{memory}/{name}/{limit}", str(memory_mib << 20))
            _write(f"{pids}/{name}/pids.max", str(max_processes))
            self._limits[name] = (memory_mib, max_processes)
        return name

    def give_back(self, name: str) -> bool:
        """The sandbox in it is dead. Whether the kernel killed any of it because its memory was full."""
        if not name:
            return False
        self._free.append(name)
        before = self._kills.get(name, 0)
        self._kills[name] = self._count_kills(name)
        return self._kills[name] > before

    def doors(self, name: str) -> list[str]:
        """The files by which a process joins a group."""
        parents = dict.fromkeys(self.parents.values()) if name else ()
        return [f"{parent}/{name}/cgroup.procs" for parent in parents]

    def remove(self) -> None:
        """Remove all groups, those too that an earlier process of the same name made. None is in use."""
        for parent in dict.fromkeys(self.parents.values()):
            with contextlib.suppress(OSError):
                for entry in os.scandir(parent):
                    if entry.is_dir():
                        os.rmdir(entry.path)
                os.rmdir(parent)

    def _count_kills(self, name: str) -> int:
        file = "memory.events" if self.kind == "v2" else "memory.oom_control"
        try:
            with open(f"{self.parents['memory']}/{name}/{file}") as lines:
                return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
        except (OSError, StopIteration):
            return 0

    def _make(self) -> str:
        name = str(self._num_made)
        for parent in dict.fromkeys(self.parents.values()):
            os.makedirs(f"{parent}/{name}", exist_ok=True)
        self._num_made += 1
        return name


def join(doors: list[str]) -> None:
    """Move this process into the groups of these files."""
    for door in doors:
        file = os.open(door, os.O_WRONLY)
        os.write(file, b"0")
        os.close(file)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
