"""Limits of memory, processes and cores: cgroups of either version, where this process may make them.

Folders are recycled: making and removing one costs as much as the rest of a sandbox. What a sandbox leaves in
one is clean pages of files, which the kernel takes back when the next one needs the room.
"""

import contextlib
import glob
import os
from dataclasses import dataclass, field, replace

from kat_sandboxes.zygote import hierarchy
from kat_sandboxes.zygote.hierarchy import BASE

PLACES = (BASE,) if os.path.isdir(BASE) else ()
"""Folders that the process which manages groups has to see."""
_PERIOD_US, _LEAST_US = 100_000, 1_000


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use. `cpus`: how many cores, or 0 for all."""

    memory_mib: int
    max_processes: int
    cpus: float = 0.0


@dataclass
class Groups:
    """A stock of cgroups. `kind` is "v2", "v1" or "none", and `note` says why there are none.

    `parents` are the folders that they are in, by controller: those of version 2 all have the same. Cores are
    limited where they can be (`has_cpu`).
    """

    kind: str
    parents: dict[str, str] = field(default_factory=dict)
    has_cpu: bool = False
    note: str = ""
    _free: list[str] = field(default_factory=list)
    _limits: dict[str, Limits] = field(default_factory=dict)
    _made: dict[str, set[str]] = field(default_factory=dict)
    _kills: dict[str, int] = field(default_factory=dict)

    @classmethod
    def find(cls, name: str) -> "Groups":
        """Make a parent group called `name`, or none where that is not allowed."""
        try:
            if hierarchy.is_unified():
                parent = hierarchy.make(name, ("memory", "pids"), hierarchy.own())
                has_cpu = "cpu" in hierarchy.controllers(os.path.dirname(parent))
                return cls("v2", dict.fromkeys(("memory", "pids"), parent), has_cpu)
            parents = {item: f"{BASE}/{item}/{name}" for item in ("memory", "pids")}
            for parent in parents.values():
                hierarchy.check(os.path.dirname(parent))
                os.makedirs(parent, exist_ok=True)
        except OSError as error:
            return cls("none", note=str(error))
        return cls("v1", parents, os.access(f"{BASE}/cpu/cpu.cfs_quota_us", os.W_OK))

    def take(self, limits: Limits) -> str:
        """A group with these limits.

        Raises:
            OSError: the kernel makes no more of them.
        """
        if self.kind == "none":
            return ""
        if not self.has_cpu:
            limits = replace(limits, cpus=0.0)
        if limits.cpus and "cpu" not in self.parents:
            self.parents["cpu"] = self._with_cpu()
        name = self._free.pop() if self._free else str(len(self._made))
        try:
            self._open(name, limits)
            if self._limits.get(name) != limits:
                self._limit(name, limits)
        except OSError:
            self._free.append(name)
            raise
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
        parents = self._joined(self._limits[name]) if name else ()
        return [f"{parent}/{name}/cgroup.procs" for parent in parents]

    def remove(self) -> None:
        """Remove all groups, those too that an earlier process of the same name made. None is in use."""
        for parent in set(self.parents.values()):
            for folder in (*glob.glob(f"{parent}/*/"), parent):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def _with_cpu(self) -> str:
        """Only once it is asked for: what shares cores has to be weighed against all else on the machine."""
        parent = self.parents["memory"]
        if self.kind == "v2":
            hierarchy.enable(os.path.dirname(parent), ("cpu",))
            hierarchy.enable(parent, ("cpu",))
            return parent
        parent = f"{BASE}/cpu/{os.path.basename(parent)}"
        os.makedirs(parent, exist_ok=True)
        return parent

    def _joined(self, limits: Limits) -> set[str]:
        """The parents of the groups that a process with these limits is in."""
        return {path for name, path in self.parents.items() if limits.cpus or name != "cpu"}

    def _open(self, name: str, limits: Limits) -> None:
        made = self._made.setdefault(name, set())
        for parent in self._joined(limits) - made:
            os.makedirs(f"{parent}/{name}", exist_ok=True)
            made.add(parent)

    def _limit(self, name: str, limits: Limits) -> None:
        memory, pids = (f"{self.parents[item]}/{name}" for item in ("memory", "pids"))
        size, quota = str(limits.memory_mib << 20), max(_LEAST_US, int(limits.cpus * _PERIOD_US))
        self._limits.pop(name, None)
        hierarchy.write(f"{pids}/pids.max", str(limits.max_processes))
        if self.kind == "v2":
            hierarchy.write(f"{memory}/memory.max", size)
            _write_if_there(f"{memory}/memory.swap.max", "0")
            if "cpu" in self.parents:
                hierarchy.write(
                    f"{memory}/cpu.max", f"{quota if limits.cpus else 'max'} {_PERIOD_US}"
                )
        else:
            both = f"{memory}/memory.memsw.limit_in_bytes"  # with swap: never below memory alone
            _write_if_there(both, "-1")
            hierarchy.write(f"{memory}/memory.limit_in_bytes", size)
            _write_if_there(both, size)
            if limits.cpus:
                hierarchy.write(f"{self.parents['cpu']}/{name}/cpu.cfs_period_us", str(_PERIOD_US))
                hierarchy.write(f"{self.parents['cpu']}/{name}/cpu.cfs_quota_us", str(quota))
        self._limits[name] = limits

    def _count_kills(self, name: str) -> int:
        # Version 2 tells its own limit from that of a group above, or of the machine, which is not its fault.
        v2 = ("memory.events", "oom ")
        file, key = v2 if self.kind == "v2" else ("memory.oom_control", "oom_kill ")
        try:
            with open(f"{self.parents['memory']}/{name}/{file}") as lines:
                return int(next(line for line in lines if line.startswith(key)).split()[1])
        except (OSError, StopIteration):
            return 0


def _write_if_there(path: str, text: str) -> None:
    """A kernel may count no swap."""
    with contextlib.suppress(FileNotFoundError):
        hierarchy.write(path, text)


def join(doors: list[str]) -> None:
    """Move this process into the groups of these files. Not by `open`, which writes to more memory."""
    for door in doors:
        file = os.open(door, os.O_WRONLY)
        os.write(file, b"0")
        os.close(file)
