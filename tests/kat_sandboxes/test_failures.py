"""What made a local sandbox fail is said by the kind of the error."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes import client
from kat_sandboxes.local import LocalBackend, LocalConfig, LocalSandbox
from katcore.errors import (
    EvictedError,
    ImageMissingError,
    NoCapacityError,
    OutOfDiskError,
    OutOfMemoryError,
    SandboxGoneError,
    StartTimeoutError,
)
from katcore.sandbox.process import Process
from katcore.schema.lease import Lease
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import bash, environment, output

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_memory_that_files_used_up(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(replace(plain, memory_mib=32, disk_mib=256)) as sandbox:
        with pytest.raises(OutOfMemoryError, match="raise its limit"):
            await sandbox.write("/work/big", bytes(128 << 20))


async def test_the_next_one_in_a_used_group_is_not_blamed(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    for _ in range(3):
        async with backend.open(replace(plain, memory_mib=96)) as sandbox:
            result = await bash(sandbox, "head -c 300000000 /dev/zero | tail -c 299999999 | wc -c")
            assert b"299999999" not in result.stdout
    async with backend.open(replace(plain, memory_mib=96)) as sandbox:
        assert isinstance(sandbox, LocalSandbox)
        Process.parse(sandbox.handle()).kill()
        with pytest.raises(EvictedError):
            await sandbox.exec(["true"])


async def test_a_sandbox_that_somebody_killed(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(plain) as sandbox:
        assert isinstance(sandbox, LocalSandbox)
        await backend.destroy(Lease("l", "h", handle=sandbox.handle()))
        with pytest.raises(EvictedError, match="killed from outside during read"):
            await sandbox.read("/etc/passwd")


async def test_a_server_that_died_takes_sandboxes_along_and_is_not_their_fault(
    tmp_path: Path, plain: SandboxSpec
) -> None:
    own = LocalBackend(LocalConfig(images=tmp_path / "images", scaffolds=tmp_path / "scaffolds"))
    try:
        async with own.open(plain) as sandbox:
            assert own._process
            os.kill(own._process.pid, signal.SIGKILL)
            with pytest.raises(SandboxGoneError) as error:
                await sandbox.exec(["sleep", "60"])
        assert type(error.value) is SandboxGoneError
        async with own.open(plain) as sandbox:
            assert await output(sandbox, "echo anew") == "anew"
    finally:
        await own.close()


async def test_a_disk_that_is_full(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(replace(plain, disk_mib=8)) as sandbox:
        await sandbox.write("/work/1", bytes(7 << 20))
        with pytest.raises(OutOfDiskError, match="No space left"):
            await sandbox.write("/work/2", bytes(4 << 20))


async def test_an_image_that_is_not_there(backend: LocalBackend, tmp_path: Path) -> None:
    folder = environment(tmp_path / "e", "FROM nothing\n")
    with pytest.raises(ImageMissingError, match="no image named 'nothing'"):
        async with backend.open(SandboxSpec(folder)):
            pass


async def test_one_that_takes_too_long_to_start(
    backend: LocalBackend, plain: SandboxSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with backend.open(plain):
        pass
    monkeypatch.setattr(client, "START_TIMEOUT_S", 0.0)
    with pytest.raises(StartTimeoutError, match="within 0 s"):
        async with backend.open(plain):
            pass
    monkeypatch.undo()
    async with backend.open(plain) as sandbox:
        assert await output(sandbox, "echo on") == "on"


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """This process may open nothing: the limit is on the numbers of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_no_descriptor_left_here(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(plain):
        pass
    with no_more_descriptors(), pytest.raises(NoCapacityError, match="no room"):
        async with backend.open(plain):
            pass
    async with backend.open(plain) as sandbox:
        assert await output(sandbox, "echo on") == "on"
