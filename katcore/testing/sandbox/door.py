"""The door: one way to one service of the host, and to nothing else."""

import asyncio
import socket
from dataclasses import replace

import pytest

from katcore.errors import SandboxError
from katcore.protocols import Sandbox, SandboxBackend, SupportsDoor
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import Declared, needs, python

_GET = "import urllib.request as u; print(u.urlopen('{url}/x', timeout=5).read().decode())"


class Door(Declared):
    """A sandbox that is opened with `has_door`, or without."""

    @needs("has_door")
    async def test_who_accepts_serves_this_sandbox_alone(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        with_door = replace(spec, has_door=True)
        async with backend.open(with_door) as one, backend.open(with_door) as two:
            doors = [_door(sandbox) for sandbox in (one, two)]
            servers = [
                await _serve(door, text) for (door, _), text in zip(doors, "12", strict=True)
            ]
            said = [
                (await python(sandbox, _GET.format(url=url))).stdout
                for sandbox, (_, url) in zip((one, two), doors, strict=True)
            ]
            assert said == [b"1\n", b"2\n"]
            for server in servers:
                server.close()

    @needs("has_door")
    async def test_when_nobody_accepts_any_more_it_is_shut(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(replace(spec, has_door=True)) as sandbox:
            door, url = _door(sandbox)
            server = await _serve(door, "x")
            server.close()
            assert (await python(sandbox, _GET.format(url=url))).exit_code != 0

    @needs("has_door")
    async def test_it_is_given_once(self, backend: SandboxBackend, spec: SandboxSpec) -> None:
        async with backend.open(replace(spec, has_door=True)) as sandbox:
            door, _ = _door(sandbox)
            door.close()
            with pytest.raises(SandboxError):
                _door(sandbox)

    @needs("has_door")
    async def test_without_asking_there_is_none(self, sandbox: Sandbox) -> None:
        with pytest.raises(SandboxError):
            _door(sandbox)

    @needs("has_door")
    async def test_other_services_stay_out_of_reach(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as service:
            port = service.getsockname()[1]
            async with backend.open(replace(spec, has_door=True)) as sandbox:
                dial = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
                assert (await python(sandbox, dial)).exit_code != 0


def _door(sandbox: Sandbox) -> tuple[socket.socket, str]:
    assert isinstance(sandbox, SupportsDoor)
    return sandbox.door()


async def _serve(door: socket.socket, text: str) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, sock=door)
