"""The door: one port of a sandbox's own loopback that the host may serve, and nothing else."""

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.errors import SandboxError
from katcore.protocols import Sandbox, SupportsDoor
from katcore.schema.task import SandboxSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")
_GET = "import urllib.request as u; print(u.urlopen('{url}/x', timeout=5).read().decode())"


async def serve(door: socket.socket, text: str) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, sock=door)


def door_of(sandbox: Sandbox) -> tuple[socket.socket, str]:
    assert isinstance(sandbox, SupportsDoor)
    return sandbox.door()


async def test_who_accepts_serves_this_sandbox_alone(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    spec = replace(plain, has_door=True)
    async with backend.open(spec) as first, backend.open(spec) as second:
        doors = [door_of(box) for box in (first, second)]
        servers = [await serve(door, text) for (door, _), text in zip(doors, "12", strict=True)]
        with pytest.raises(SandboxError, match="taken"):
            door_of(first)
        url = doors[0][1]
        program = ["python3", "-c", _GET.format(url=url)]
        said = [(await box.exec(program)).stdout for box in (first, second)]
        assert said == [b"1\n", b"2\n"]
        for server in servers:
            server.close()
        result = await first.exec(program)
        assert b"refused" in result.stderr


async def test_without_asking_there_is_no_door(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(plain) as sandbox:
        with pytest.raises(SandboxError, match="without a door"):
            door_of(sandbox)
        program = "import socket; socket.create_connection(('127.0.0.1', 8823), 5)"
        assert b"refused" in (await sandbox.exec(["python3", "-c", program])).stderr


async def test_the_host_s_own_services_stay_out_of_reach(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = service.getsockname()[1]
        async with backend.open(replace(plain, has_door=True)) as sandbox:
            program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
            assert b"refused" in (await sandbox.exec(["python3", "-c", program])).stderr


async def test_tools_are_shown_read_only_and_are_no_change(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    tools = backend._scaffolds / "agent-1"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "run").write_text("#!/bin/sh\necho ran\n")
    (tools / "run").chmod(0o755)
    async with backend.open(replace(plain, tools=tools)) as sandbox:
        assert (await sandbox.exec(["/opt/scaffold/run"])).stdout == b"ran\n"
        result = await sandbox.exec(["bash", "-c", "echo x >> /opt/scaffold/run"])
        assert b"Read-only file system" in result.stderr
        changes = await sandbox.changes()  # type: ignore[attr-defined]
        assert b"scaffold" not in changes
    assert "x" not in (tools / "run").read_text().split("\n")[-1]


async def test_tools_from_anywhere_else_are_refused(
    backend: LocalBackend, plain: SandboxSpec, tmp_path: Path
) -> None:
    with pytest.raises(SandboxError, match="shown from"):
        async with backend.open(replace(plain, tools=tmp_path)):
            pass
