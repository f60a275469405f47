"""What a backend declares of itself, the fixtures of the checks, and short ways to talk to a sandbox."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import pytest_asyncio

from katcore.protocols import Sandbox, SandboxBackend
from katcore.schema.rollout import ExecResult
from katcore.schema.task import SandboxSpec

CheckT = TypeVar("CheckT", bound=Callable[..., Any])


class Declared:
    """What a backend may differ in; a subclass says so.

    The image of `dockerfile` has `sh`, `python3`, and the GNU coreutils and findutils.
    """

    dockerfile = "FROM host\nWORKDIR /work\n"
    workdir = "/work"
    """The WORKDIR of `dockerfile`, which is empty."""
    output_limit = 1 << 20
    """How many bytes of each stream a result holds."""
    has_changes = True
    """Its sandboxes are `SupportsChanges`."""
    has_door = True
    """Its sandboxes are `SupportsDoor`."""
    can_reap = True
    """It is `SupportsReap`, and its sandboxes are `SupportsHandle`."""
    has_snapshot = False
    """Its sandboxes are `SupportsSnapshot`."""
    has_live = False
    """Its sandboxes are `SupportsLive`."""
    has_memory_limit = True
    has_process_limit = True
    has_disk_limit = True
    has_cpu_limit = True
    """It holds a sandbox to its `memory_mib`, `max_processes`, all files together `disk_mib`, and `cpus`."""
    has_visible_processes = True
    """Its processes are among those of the machine that the tests run on."""

    @pytest.fixture(autouse=True)
    def _left_out_by_declaration(self, request: pytest.FixtureRequest) -> None:
        for name in getattr(request.function, "needs", ()):
            if not getattr(self, name):
                pytest.skip(f"left out by declaration: {name} = False")

    @pytest.fixture
    def spec(self, tmp_path: Path) -> SandboxSpec:
        """A machine with an empty folder to work in."""
        return SandboxSpec(environment(tmp_path / "environment", self.dockerfile))

    @pytest_asyncio.fixture(loop_scope="module")
    async def sandbox(self, backend: SandboxBackend, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        """An open sandbox."""
        async with backend.open(spec) as made:
            yield made


def needs(*names: str) -> Callable[[CheckT], CheckT]:
    """A check that is left out where one of these is declared to be False."""

    def mark(check: CheckT) -> CheckT:
        vars(check)["needs"] = names
        return check

    return mark


def environment(folder: Path, dockerfile: str) -> Path:
    """An environment folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile)
    return folder


async def sh(sandbox: Sandbox, command: str, *, timeout_s: float = 30.0) -> ExecResult:
    """Run a shell command."""
    return await sandbox.exec(["sh", "-c", command], timeout_s=timeout_s)


async def output(sandbox: Sandbox, command: str) -> str:
    """Both streams of a shell command that has to succeed."""
    result = await sh(sandbox, command)
    text = (result.stdout + result.stderr).decode(errors="backslashreplace")
    assert result.exit_code == 0, text
    return text.strip()


async def python(sandbox: Sandbox, source: str) -> ExecResult:
    """Run Python code."""
    return await sandbox.exec(["python3", "-c", source], timeout_s=30.0)


async def refused(sandbox: Sandbox, command: str) -> None:
    """A shell command has to fail."""
    result = await sh(sandbox, command)
    assert result.exit_code != 0, f"{command}: {result.stdout.decode(errors='replace')}"


async def commands_of(sandbox: Sandbox) -> str:
    """The command lines of all processes inside, but for that of the one that asks."""
    return await output(
        sandbox,
        "for p in /proc/[0-9]*; do [ $p = /proc/$$ ] || tr '\\0' ' ' < $p/cmdline; done"
        " 2>/dev/null || true",
    )


def processes_with(word: str) -> list[int]:
    """The processes of this machine that have a word among their arguments."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if word in (process.info["cmdline"] or ())
    ]


async def wait_until(is_so: Callable[[], bool], *, seconds: float = 10.0) -> None:
    """Wait for something to come about, or fail."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.05)
