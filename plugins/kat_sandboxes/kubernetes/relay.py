"""Runs beside a sandbox, in a container of its own: the machine's channel and its door, for the backend.

The agent connects once, before anything foreign runs, and the socket is removed then: sandboxed code finds
nothing to connect to, and cannot see this process. The backend comes by `exec` into this container, again and
again if need be (see `link`). Standard library only.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import struct
import sys
import threading
import time
from typing import Any

from kat_sandboxes.kubernetes.link import MACHINE, PIECE, Link

CHANNEL = "/.kat/channel/socket"
CONTROL = "/.kat/own/socket"
AGENT, TOOLS, SHARED = "/.kat/agent", "/.kat/tools", "/.kat/shared"
"""What the image has, and where a sandbox's share of it is put."""
_DESCRIPTOR = struct.Struct("i")
_DOORS = 256
_WAIT_S, _STEP_S = 8.0, 0.02
"""How long the backend's stream waits for a relay that is still starting."""


def main() -> None:
    """The whole life of the container: `sys.argv[1]` is for how many seconds the backend may be away."""
    asyncio.run(_Relay(float(sys.argv[1])).run())
    os._exit(0)


def unpack() -> None:
    """Copies what the sandbox is shown: its image knows nothing of katcore."""
    for folder in (AGENT, TOOLS):
        target = f"{SHARED}/{os.path.basename(folder)}"
        shutil.copytree(folder, target, symlinks=True)
        for parent, _, names in os.walk(target):
            for path in (parent, *(os.path.join(parent, name) for name in names)):
                _let_read(path)


def pump() -> None:
    """What the backend executes: its standard input and output are the link's stream."""
    control = socket.socket(socket.AF_UNIX)
    until_s = time.monotonic() + _WAIT_S
    while control.connect_ex(CONTROL):
        if time.monotonic() > until_s:
            sys.exit(1)
        time.sleep(_STEP_S)

    def out() -> None:
        while data := control.recv(PIECE):
            os.write(1, data)
        os._exit(0)

    threading.Thread(target=out, daemon=True).start()
    while data := os.read(0, PIECE):
        control.sendall(data)


def _let_read(path: str) -> None:
    """Everybody may: whoever the sandbox's user is, without capabilities."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISLNK(mode):
        os.chmod(path, stat.S_IMODE(mode) | 0o444 | (0o111 if mode & 0o100 else 0))


class _Stream:
    """A connection of `pump`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.heard_s = time.monotonic()

    async def readexactly(self, n: int, /) -> bytes:
        data = await self._reader.readexactly(n)
        self.heard_s = time.monotonic()
        return data

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def close(self) -> None:
        self._writer.transport.abort()


class _Relay:
    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._link = Link(self._deal)
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._num = 0
        self._is_over = asyncio.Event()
        self._stream: _Stream | None = None
        self._doors: list[asyncio.Server] = []

    async def run(self) -> None:
        reader, writer = await asyncio.open_connection(sock=await self._machine())
        # The first that it says brings the door along, which asyncio's own reading would drop.
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        self._writers[MACHINE] = writer
        control = await asyncio.start_unix_server(self._attach, CONTROL)
        work = [
            asyncio.create_task(self._from_machine(reader, writer)),
            asyncio.create_task(self._watch()),
        ]
        await self._is_over.wait()
        control.close()
        for task in work:
            task.cancel()

    async def _machine(self) -> socket.socket:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(CHANNEL)
            os.chmod(CHANNEL, 0o666)
            listener.listen(1)
            listener.setblocking(False)
            async with asyncio.timeout(self._patience_s):
                machine, _ = await asyncio.get_running_loop().sock_accept(listener)
        os.unlink(CHANNEL)
        machine.setblocking(False)
        return machine

    async def _attach(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The last to come is the one: of an older stream nobody may have heard that it broke."""
        if self._stream:
            self._stream.close()
        stream = self._stream = _Stream(reader, writer)
        with contextlib.suppress(OSError, EOFError):
            await self._link.serve(stream)
        stream.close()

    async def _watch(self) -> None:
        """The end, when nothing was heard for long: not every stream that breaks says so."""
        heard_s = time.monotonic()
        while (left_s := heard_s + self._patience_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
            if self._stream:
                heard_s = self._stream.heard_s
        self._is_over.set()

    async def _from_machine(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        data, doors = await _first(writer.get_extra_info("socket").fileno())
        self._doors = [await asyncio.start_server(self._door, sock=door) for door in doors]
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        while data:
            await self._link.send({"s": MACHINE}, data)
            data = await _read(reader)
        await self._end(MACHINE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                await self._link.flushed()
        self._is_over.set()

    async def _door(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) > _DOORS:
            writer.transport.abort()
            return
        self._num += 1
        number = self._num
        self._writers[number] = writer
        await self._link.send({"s": number, "open": True})
        while data := await _read(reader):
            await self._link.send({"s": number}, data)
        await self._end(number)

    async def _end(self, number: int) -> None:
        await self._link.send({"s": number, "end": True})

    async def _deal(self, head: dict[str, Any], body: bytes) -> None:
        """From the backend. What nobody reads at the door is kept, within this container's limits."""
        if head.get("over"):
            self._is_over.set()
            return
        writer = self._writers.get(head["s"])
        if writer is None:
            return
        with contextlib.suppress(OSError):
            writer.write(body)
            if head["s"] == MACHINE:
                await writer.drain()
        if head.get("end"):
            self._writers.pop(head["s"]).close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(PIECE)
    except OSError:
        return b""


async def _first(descriptor: int) -> tuple[bytes, list[socket.socket]]:
    """The first that comes over a socket, and the sockets that come with it."""
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    own = os.dup(descriptor)

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(own, wake)
    try:
        await readable
    finally:
        loop.remove_reader(own)
    with socket.socket(fileno=own) as channel:
        channel.setblocking(False)
        data, attached, _, _ = channel.recvmsg(PIECE, socket.CMSG_SPACE(_DESCRIPTOR.size))
    found = [
        _DESCRIPTOR.unpack(content)[0] for _, kind, content in attached if kind == socket.SCM_RIGHTS
    ]
    return data, [socket.socket(fileno=number) for number in found]
