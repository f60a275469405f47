"""What made a container fail is said by the kind of the error."""

from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes import client
from kat_sandboxes.docker.backend import DockerBackend
from kat_sandboxes.docker.engine import Engine
from katcore.errors import (
    EvictedError,
    ImageMissingError,
    OutOfDiskError,
    OutOfMemoryError,
    StartTimeoutError,
    TaskError,
)
from katcore.protocols import SupportsCapacity, SupportsChanges, SupportsHandle
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes import engine as engines
from tests.kat_sandboxes.engine import BASE, marked
from tests.kat_sandboxes.machines import environment, output

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest.fixture
def spec(tmp_path: Path) -> SandboxSpec:
    return SandboxSpec(environment(tmp_path / "environment", f"FROM {BASE}\nWORKDIR /work\n"))


async def test_memory_that_the_whole_sandbox_used_up(
    backend: DockerBackend, spec: SandboxSpec
) -> None:
    async with backend.open(replace(spec, memory_mib=48)) as sandbox:
        with pytest.raises(OutOfMemoryError, match="during write; raise its limit"):
            await sandbox.write("/work/big", bytes(128 << 20))


async def test_one_whose_command_ran_out_of_memory_and_that_was_killed_later(
    engine: str, backend: DockerBackend, spec: SandboxSpec
) -> None:
    async with backend.open(replace(spec, memory_mib=48)) as sandbox:
        result = await sandbox.exec(
            ["bash", "-c", "head -c 300000000 /dev/zero | tail -c 299999999"]
        )
        assert result.stdout == b""
        assert await output(sandbox, "echo on") == "on"
        assert isinstance(sandbox, SupportsHandle)
        engines.client(engine).kill(sandbox.handle())
        with pytest.raises(EvictedError, match="killed from outside during exec"):
            await sandbox.exec(["true"])


async def test_one_that_somebody_removed(
    engine: str, backend: DockerBackend, spec: SandboxSpec
) -> None:
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsHandle)
        assert isinstance(sandbox, SupportsChanges)
        engines.client(engine).remove_container(sandbox.handle(), force=True)
        with pytest.raises(EvictedError, match="during changes"):
            await sandbox.changes()
        with pytest.raises(EvictedError, match="during read"):
            await sandbox.read("/etc/passwd")


async def test_one_that_ended_by_itself_was_not_killed(engine: str) -> None:
    asked, api, name = Engine(engine), engines.client(engine), "katcore-test-ended"
    body = {"Image": BASE, "Cmd": ["sh", "-c", "exit 3"], "NetworkDisabled": True}
    api.create_container_from_config(body, name)
    try:
        api.start(name)
        assert await asked.call(asked.cause, name) == ""
    finally:
        api.remove_container(name, force=True)
        asked.close()


async def test_a_file_beyond_the_disk(backend: DockerBackend, spec: SandboxSpec) -> None:
    async with backend.open(replace(spec, disk_mib=8)) as sandbox:
        with pytest.raises(OutOfDiskError):
            await sandbox.write("/work/big", bytes(16 << 20))


async def test_an_image_that_is_not_there(backend: DockerBackend, tmp_path: Path) -> None:
    nothing = "localhost/katcore-test-nothing:latest"
    folder = environment(tmp_path / "e", f"FROM {BASE}\nRUN true\nFROM {nothing}\nRUN true\n")
    with pytest.raises(ImageMissingError, match=r"Dockerfile \(FROM .*katcore-test-nothing"):
        async with backend.open(SandboxSpec(folder)):
            pass
    folder = environment(tmp_path / "f", f"FROM {BASE}\nCOPY nothing /x\n")
    with pytest.raises(TaskError, match="nothing"):
        async with backend.open(SandboxSpec(folder)):
            pass


async def test_a_snapshot_is_refused(backend: DockerBackend, spec: SandboxSpec) -> None:
    with pytest.raises(ImageMissingError, match="no snapshot s1: containers have none"):
        async with backend.open(replace(spec, snapshot="s1")):
            pass


async def test_one_that_takes_too_long_to_start(
    engine: str, backend: DockerBackend, spec: SandboxSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with backend.open(spec):
        pass
    monkeypatch.setattr(client, "START_TIMEOUT_S", 0.0)
    with pytest.raises(StartTimeoutError, match="within 0 s"):
        async with backend.open(spec):
            pass
    monkeypatch.undo()
    assert marked(engine) == []
    async with backend.open(spec) as sandbox:
        assert await output(sandbox, "echo on") == "on"


async def test_it_says_how_much_there_is(backend: DockerBackend) -> None:
    assert isinstance(backend, SupportsCapacity)
    assert backend.capacity().sandboxes >= 16
