"""The backend's end of a sandbox's link: keeps it up through `exec`, as long as the pod is there."""

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from kat_sandboxes.kubernetes.api import Exec, GoneError
from kat_sandboxes.kubernetes.link import MACHINE, PIECE, Link

Connect = Callable[[], AbstractAsyncContextManager[Exec]]
_GREET_S, _ASK_S, _SILENT_S = 10.0, 20.0, 75.0
_ASKS = 4
"""How often at least, before the other end gives up hearing of us."""
_FIRST_S, _MOST_S = 0.2, 5.0
_OVER_S = 2.0


class Tunnel:
    """A machine's channel, as a socket; and its door, as one that listens.

    The socket ends when the pod is gone, or cannot be reached for `patience_s` seconds.
    """

    def __init__(self, connect: Connect, patience_s: float, *, has_door: bool) -> None:
        self._connect = connect
        self._patience_s = patience_s
        self._link = Link(self._deal)
        self.channel, self._own = socket.socketpair()
        self.channel.setblocking(False)
        self._own.setblocking(False)
        self._door = _Listener() if has_door else None
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._heard_s = 0.0
        self._work: set[asyncio.Task[None]] = set()
        self._start(self._keep())
        self._start(self._from_channel())

    async def close(self) -> None:
        """Tell the other end that it is over, and let go."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_OVER_S):
                await self._link.send({"over": True})
                await self._link.flushed()
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        self._let_go()

    def _let_go(self) -> None:
        for writer in self._writers.values():
            writer.transport.abort()
        self._own.close()
        if self._door:
            self._door.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s, lost_s = _FIRST_S, loop.time()
        while loop.time() - lost_s < self._patience_s:
            self._heard_s = 0.0
            try:
                async with self._connect() as stream:
                    await self._serve(_Heard(stream, self._hear))
            except GoneError:
                break
            except (OSError, EOFError, TimeoutError):
                pass
            if self._heard_s:
                delay_s, lost_s = _FIRST_S, self._heard_s
            await asyncio.sleep(delay_s)
            delay_s = min(_MOST_S, 2 * delay_s)
        self._end_channel()

    async def _serve(self, stream: "_Heard") -> None:
        """Until it ends, or nothing is heard in spite of asking."""
        loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._link.serve(stream))
        began_s = loop.time()
        try:
            while True:
                ask_s = min(_ASK_S, self._patience_s / _ASKS) if self._heard_s else _GREET_S
                done, _ = await asyncio.wait([serving], timeout=ask_s)
                if done:
                    serving.result()
                    return
                limit_s = _SILENT_S if self._heard_s else _GREET_S
                if loop.time() - max(began_s, self._heard_s) >= limit_s:
                    return
                self._link.ask()
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    def _hear(self) -> None:
        self._heard_s = asyncio.get_running_loop().time()

    async def _from_channel(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(self._own, PIECE):
                await self._link.send({"s": MACHINE}, data)

    async def _deal(self, head: dict[str, Any], body: bytes) -> None:
        number = head["s"]
        if number == MACHINE:
            if head.get("end"):
                self._end_channel()
            else:
                await self._to_channel(body)
        elif head.get("open"):
            # Not in vain, if the stream breaks meanwhile: the message will not come again.
            await asyncio.shield(self._start(self._open(number)))
        elif writer := self._writers.get(number):
            with contextlib.suppress(OSError):
                if head.get("end"):
                    writer.write_eof()
                else:
                    writer.write(body)
                    await writer.drain()

    async def _to_channel(self, body: bytes) -> None:
        """The first message brings the door along, as a machine's own would."""
        with contextlib.suppress(OSError):
            if self._door and not self._door.is_given:
                self._door.give(self._own, body)
                return
            await asyncio.get_running_loop().sock_sendall(self._own, body)

    def _end_channel(self) -> None:
        with contextlib.suppress(OSError):
            self._own.shutdown(socket.SHUT_RDWR)

    async def _open(self, number: int) -> None:
        connection = self._door.connect() if self._door else None
        if connection is None:
            await self._link.send({"s": number, "end": True})
            return
        reader, self._writers[number] = await asyncio.open_connection(sock=connection)
        self._start(self._from_door(number, reader))

    async def _from_door(self, number: int, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                await self._link.send({"s": number}, data)
        self._writers.pop(number).close()
        await self._link.send({"s": number, "end": True})


class _Heard:
    """A stream that says when something came."""

    def __init__(self, stream: Exec, hear: Callable[[], None]) -> None:
        self.write = stream.write
        self._stream = stream
        self._hear = hear

    async def readexactly(self, n: int, /) -> bytes:
        data = await self._stream.readexactly(n)
        self._hear()
        return data


class _Listener:
    """A listening socket that nobody but this process can find."""

    def __init__(self) -> None:
        self.is_given = False
        self._folder = Path(tempfile.mkdtemp(prefix="katcore-door-"))
        self._descriptor = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        self._socket = socket.socket(socket.AF_UNIX)
        # By its descriptor: a socket's path has to be short.
        self._path = f"/proc/self/fd/{self._descriptor}/socket"
        self._socket.bind(self._path)
        self._socket.listen(64)

    def give(self, channel: socket.socket, body: bytes) -> None:
        """Send it along with these few bytes. From then on it is the receiver's."""
        socket.send_fds(channel, [body], [self._socket.fileno()])
        self.is_given = True
        self._socket.close()

    def connect(self) -> socket.socket | None:
        """A connection to who has it, or None if nobody listens any more."""
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            return None
        return connection

    def close(self) -> None:
        """Remove it."""
        self._socket.close()
        os.close(self._descriptor)
        shutil.rmtree(self._folder, ignore_errors=True)
