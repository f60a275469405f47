"""Backends and sandboxes for tests, and short ways to talk to them."""

import asyncio
import shlex
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from kat_sandboxes.local import LocalBackend, LocalConfig
from katcore.protocols import Sandbox
from katcore.schema.rollout import ExecResult
from katcore.schema.task import SandboxSpec


def environment(folder: Path, dockerfile: str = "FROM host\nWORKDIR /work\n", **files: str) -> Path:
    """An environment folder; keyword names are file names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Dockerfile").write_text(dockerfile)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@asynccontextmanager
async def opened(images: Path, dockerfile: str = "") -> AsyncIterator[Sandbox]:
    """One sandbox of a backend of its own."""
    backend = LocalBackend(LocalConfig(images=images))
    folder = environment(images.parent / "environment", dockerfile or "FROM host\nWORKDIR /work\n")
    try:
        async with backend.open(SandboxSpec(folder)) as sandbox:
            yield sandbox
    finally:
        await backend.close()


async def bash(sandbox: Sandbox, command: str, *, timeout_s: float = 20.0) -> ExecResult:
    return await sandbox.exec(["bash", "-c", command], timeout_s=timeout_s)


async def output(sandbox: Sandbox, command: str) -> str:
    """Both streams of a command that has to succeed."""
    result = await bash(sandbox, command)
    text = (result.stdout + result.stderr).decode(errors="backslashreplace")
    assert result.exit_code == 0, text
    return text.strip()


async def python(sandbox: Sandbox, source: str) -> str:
    """What Python code prints inside the sandbox."""
    return await output(sandbox, f"python3 -c {shlex.quote(source)}")


def processes_with(word: str) -> list[psutil.Process]:
    """Processes of the whole machine whose command line holds `word`."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word in part for part in process.info["cmdline"] or ())
    ]


async def wait_until(is_so: Callable[[], bool], *, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.05)
