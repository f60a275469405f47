"""A backend whose machines are files, so that another process could find them; and how to hold some."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from katcore.errors import SandboxElsewhereError, SandboxError
from katcore.plugin import Offer, Plugins, hookimpl
from katcore.protocols import Sandbox
from katcore.sandbox.lease import LeasedBackend, Register
from katcore.sandbox.ledger import Ledger
from katcore.sandbox.process import Process
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec
from tests.rollout.fakes import FakeSandbox

SPEC = SandboxSpec(Path("/nowhere"))


class FileConfig(BaseModel):
    folder: Path
    mark: str = "mark"


class FileMachine(FakeSandbox):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def handle(self) -> str:
        return self.path.name


@dataclass
class FileBackend:
    config: FileConfig
    closed: int = 0
    fails: dict[str, Exception] = field(default_factory=dict)
    observe: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        self.observe()
        self._fail("open")
        path = self.config.folder / f"{self.mark()}-{len(list(self.config.folder.iterdir()))}"
        path.touch()
        try:
            yield FileMachine(path)
        finally:
            self._fail("exit")
            path.unlink(missing_ok=True)

    async def close(self) -> None:
        self.closed += 1

    def mark(self) -> str:
        return self.config.mark

    async def destroy(self, lease: Lease) -> None:
        (self.config.folder / lease.handle).unlink(missing_ok=True)

    async def sweep(self, holder: Holder) -> None:
        if holder.host == "elsewhere":
            raise SandboxElsewhereError("it is elsewhere")
        if (self.config.folder / "stuck").exists():
            raise SandboxError("it is stuck")
        for path in self.config.folder.glob(f"{holder.mark}-*"):
            path.unlink(missing_ok=True)

    def _fail(self, method: str) -> None:
        if method in self.fails:
            raise self.fails[method]


def plugins(made: list[FileBackend] | None = None) -> Plugins:
    """With `files`, and `plain` that cannot reap; `made` gets what is made."""

    def make(config: FileConfig) -> FileBackend:
        backend = FileBackend(config)
        if made is not None:
            made.append(backend)
        return backend

    @hookimpl
    def katcore_sandboxes() -> list[Offer[Any, Any]]:
        return [Offer("files", FileConfig, make, "")]

    module = ModuleType("files")
    vars(module)["katcore_sandboxes"] = katcore_sandboxes
    return Plugins({"files": module})


def holder(name: str = "h", *, mark: str = "mark", process: str = "", **changes: str) -> Holder:
    folder = changes.pop("folder", "/nowhere")
    options = f'{{"folder": "{folder}", "mark": "{mark}"}}'
    return Holder(
        name,
        changes.pop("backend", "files"),
        options,
        mark,
        changes.pop("host", "here"),
        process or str(Process.of(os.getpid())),
        **changes,
    )


def dead() -> str:
    """A process of this machine that has ended."""
    own = Process.of(os.getpid())
    return str(Process(own.kernel, own.pid, own.started + 1))


def states(ledger: Ledger) -> list[str]:
    return [lease.state for lease in ledger.read()[1]]


@asynccontextmanager
async def leased(ledger: Ledger, folder: Path) -> AsyncIterator[tuple[FileBackend, LeasedBackend]]:
    backend = FileBackend(FileConfig(folder=folder))
    register = Register(ledger, holder(folder=str(folder)))
    yield backend, LeasedBackend(backend, register)
    await asyncio.to_thread(register.close)


async def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.02)


def machines(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
