"""Groups that limit sandboxes: of the version that this machine has, and where in version 2 they are made."""

import logging
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes import capacity, reap
from kat_sandboxes.local import LocalBackend, LocalConfig
from kat_sandboxes.zygote import hierarchy
from kat_sandboxes.zygote.cgroups import Groups, Limits
from katcore.errors import SandboxUnavailableError
from katcore.schema.task import SandboxSpec
from tests.conftest import NOT_RUN
from tests.kat_sandboxes.machines import output

_FILES = {
    "v2": {
        "memory": ("memory.max", "memory.swap.max"),
        "pids": ("pids.max",),
        "cpu": ("cpu.max",),
    },
    "v1": {
        "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        "pids": ("pids.max",),
        "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us"),
    },
}
_ALL_FILES = ("cgroup.controllers", "cgroup.procs", "cgroup.subtree_control")


@pytest.fixture
def groups() -> Iterator[Groups]:
    made = Groups.find(f"katcore-{secrets.token_hex(6)}")
    if made.kind == "none":
        pytest.skip(f"{NOT_RUN}: no cgroups can be made here: {made.note}")
    yield made
    made.remove()


def told(groups: Groups, name: str, controller: str) -> str:
    """What the kernel says of a group's limits."""
    paths = (
        Path(groups.parents[controller], name, file) for file in _FILES[groups.kind][controller]
    )
    return " ".join(path.read_text().strip() for path in paths if path.exists())


def test_a_group_is_limited_and_used_again(groups: Groups) -> None:
    name = groups.take(Limits(64, 20))
    size, swap = str(64 << 20), "0" if groups.kind == "v2" else str(64 << 20)
    assert told(groups, name, "memory") in {f"{size} {swap}", size}
    assert told(groups, name, "pids") == "20"
    other = groups.take(Limits(32, 20))
    assert other != name
    assert not groups.give_back(name)
    assert groups.take(Limits(128, 10)) == name
    assert told(groups, name, "memory").startswith(str(128 << 20))
    assert told(groups, name, "pids") == "10"
    assert told(groups, other, "memory").startswith(str(32 << 20))


def test_cores_are_limited_once_it_is_asked_for(groups: Groups) -> None:
    if not groups.has_cpu:
        pytest.skip(f"{NOT_RUN}: cores cannot be limited here")
    plain = groups.take(Limits(64, 20))
    assert "cpu" not in groups.parents
    assert not Path(groups.parents["memory"], plain, "cpu.max").exists()
    half = groups.take(Limits(64, 20, 0.5))
    assert told(groups, half, "cpu") == "50000 100000"
    groups.give_back(half)
    assert groups.take(Limits(64, 20, 1.25)) == half
    assert told(groups, half, "cpu") == "125000 100000"
    groups.give_back(half)
    assert groups.take(Limits(64, 20)) == half
    if groups.kind == "v2":  # in version 1 it is not joined then
        assert told(groups, half, "cpu") == "max 100000"


def test_none_is_left(groups: Groups) -> None:
    for limits in (Limits(64, 20), Limits(64, 20, 0.5)):
        groups.take(limits)
    mark = Path(groups.parents["memory"]).name
    assert set(map(str, reap._groups(mark))) >= set(groups.parents.values())
    groups.remove()
    assert not list(reap._groups(mark))


@pytest.mark.asyncio(loop_scope="module")
async def test_what_files_took_is_free_for_the_next_in_the_group(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    for _ in range(3):
        async with backend.open(replace(plain, memory_mib=300, disk_mib=256)) as sandbox:
            await output(sandbox, "head -c 200000000 /dev/zero > big")
        async with backend.open(replace(plain, memory_mib=64)) as sandbox:
            await output(sandbox, "python3 -c 'bytearray(30 << 20)'")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_group_that_cannot_be_had_fails_its_sandbox_alone(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    async with backend.open(plain) as sandbox:
        if backend.limits == "none":
            pytest.skip(f"{NOT_RUN}: no cgroups can be made here")
        with pytest.raises(SandboxUnavailableError, match="Invalid argument"):
            async with backend.open(replace(plain, max_processes=-1)):
                pass
        assert await output(sandbox, "echo on") == "on"
    async with backend.open(plain) as sandbox:
        assert await output(sandbox, "echo on") == "on"


class Machine:
    """A fake of /sys/fs/cgroup, as version 2 has it: folders with the files that are looked at."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.add("", pids="1 2", has_type=False)

    def add(
        self, path: str, *, pids: str = "", has: str = "cpu memory pids", has_type: bool = True
    ) -> None:
        folder = self.base / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(_ALL_FILES, (has, pids, ""), strict=True):
            (folder / name).write_text(text)
        if has_type:
            (folder / "cgroup.type").write_text("domain")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(hierarchy, "BASE", str(tmp_path / "cgroup"))
    return Machine(tmp_path / "cgroup")


def place(machine: Machine, near: str) -> str:
    """Below which folder a group is made for a process at `near`."""
    made = Path(hierarchy.make("x", ("memory", "pids"), near))
    assert made.name == "x"
    return str(made.parent.relative_to(machine.base))


def test_a_group_is_made_at_the_nearest_place_without_processes(machine: Machine) -> None:
    machine.add("user.slice")
    machine.add("user.slice/session.scope", pids="3")
    machine.add("user.slice/x")
    assert place(machine, "/user.slice/session.scope") == "user.slice"
    folder = machine.base / "user.slice"
    for name in ("", "x"):
        assert (folder / name / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_the_root_of_the_machine_may_have_both(machine: Machine) -> None:
    machine.add("x")
    assert place(machine, "/") == "."


def test_where_memory_is_not_shared_out_it_is_made_further_up(machine: Machine) -> None:
    machine.add("a", has="cpu")
    machine.add("a/b", pids="3", has="")
    machine.add("x")
    assert place(machine, "/a/b") == "."


@pytest.mark.parametrize("path", ["/../other", "/not/here"])
def test_a_process_whose_group_is_not_to_be_seen(machine: Machine, path: str) -> None:
    machine.add("x")
    assert place(machine, path) == "."


def test_what_cannot_be_is_said(machine: Machine) -> None:
    machine.add("", has="cpu")
    with pytest.raises(OSError, match="lacks the controllers: memory, pids"):
        hierarchy.make("x", ("memory", "pids"), "/")


@pytest.mark.parametrize(
    ("task", "most", "expected"), [(0, 0, 0), (2, 0, 2), (0, 1.5, 1.5), (2, 1.5, 1.5), (1, 1.5, 1)]
)
def test_a_task_s_cores_are_bounded_by_the_backend_s(
    tmp_path: Path, task: float, most: float, expected: float
) -> None:
    assert capacity.cores(SandboxSpec(tmp_path, cpus=task), most) == expected


def test_where_there_are_no_groups_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = LocalBackend(LocalConfig(images=tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            made._limits(SandboxSpec(tmp_path, cpus=2))
    assert caplog.text.count("not held to 2 cores here") == 1
