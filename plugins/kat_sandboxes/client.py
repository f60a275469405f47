"""The backend's end of a sandbox's channel, at whose other end its pid 1 serves (see `zygote.machine`)."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from kat_sandboxes import failure
from kat_sandboxes.zygote import frame
from katcore.errors import (
    OutOfDiskError,
    SandboxError,
    SandboxGoneError,
    SandboxTimeoutError,
    StartTimeoutError,
)
from katcore.schema.rollout import ExecResult

START_TIMEOUT_S = 60.0
_DOOR, _SENDER = struct.Struct("i"), struct.Struct("3i")


class ChannelSandbox:
    """One open sandbox, without a handle. Requests are served one at a time.

    `cause` says what ended a machine that does not answer: "memory", "killed", or "" if it is not known.
    """

    def __init__(self, channel: socket.socket, cause: Callable[[], Awaitable[str]]) -> None:
        self._channel = channel
        self._cause = cause
        self._door: socket.socket | None = None
        self.sender = 0
        """The pid of who is at the other end, where the channel was asked to tell."""
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ready(self) -> None:
        """Wait until the machine is set up."""
        self._channel.setblocking(False)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                data = await self._first()
                self._reader, self._writer = await asyncio.open_connection(sock=self._channel)
                self._reader.feed_data(data)
                head, _ = await self._receive()
        except TimeoutError as error:
            raise StartTimeoutError(
                f"the sandbox was not ready within {START_TIMEOUT_S:g} s"
            ) from error
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise failure.gone(await self._cause(), "its start") from error
        if "error" in head:
            raise failure.setup_failed(head)

    async def _first(self) -> bytes:
        """The beginning of the first message. With it come its sender's pid, and the door if there is one."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(self._channel, wake)
        try:
            await readable
        finally:
            loop.remove_reader(self._channel)
        room = sum(socket.CMSG_SPACE(item.size) for item in (_DOOR, _SENDER))
        data, attached, _, _ = self._channel.recvmsg(1 << 16, room)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        for _, kind, content in attached:
            if kind == socket.SCM_RIGHTS:
                self._door = socket.socket(fileno=_DOOR.unpack(content)[0])
            elif data:
                self.sender = _SENDER.unpack(content)[0]
        return data

    def door(self) -> tuple[socket.socket, str]:
        """See `SupportsDoor`."""
        door, self._door = self._door, None
        if door is None:
            raise SandboxError("the sandbox was opened without a door, or it is taken")
        return door, f"http://127.0.0.1:{frame.DOOR}"

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> ExecResult:
        """See `Sandbox.exec`. Output beyond 1 MiB per stream is dropped, and the result says so.

        Cancelled, it kills the command and all that it started.
        """
        request = {"argv": list(argv), "cwd": cwd, "env": dict(env or {}), "timeout_s": timeout_s}
        head, body = await self._ask("exec", request, timeout_s=timeout_s)
        if head.get("error") == "timeout":
            raise SandboxTimeoutError(f"{argv[0]}: ran past its {timeout_s:g} s; all is killed")
        split = head["stdout"]
        return ExecResult(head["code"], body[:split], body[split:], head["truncated"])

    async def read(self, path: str) -> bytes:
        """See `Sandbox.read`."""
        return (await self._ask("read", {"path": path}))[1]

    async def write(self, path: str, data: bytes) -> None:
        """See `Sandbox.write`."""
        await self._ask("write", {"path": path}, data)

    async def changes(self) -> bytes:
        """See `SupportsChanges`: a tar archive; deleted paths carry a pax header."""
        return (await self._ask("changes", {}))[1]

    async def apply(self, changes: bytes) -> None:
        """See `SupportsChanges`."""
        await self._ask("apply", {}, changes)

    async def settle(self, services: Sequence[str], *, grace_s: float = 0.0) -> tuple[str, ...]:
        """See `SupportsLive`."""
        head, _ = await self._ask("settle", {"services": list(services), "grace_s": grace_s})
        return tuple(head["ended"])

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """All processes of the agent's user are stopped meanwhile.

        They could kill a grader that starts, as long as it is not another user's yet.
        """
        await self._ask("hold", {})
        try:
            yield
        finally:
            await self._ask("go_on", {})

    def close(self) -> None:
        """Let go of the channel; the machine ends at its end of stream."""
        if self._writer:
            self._writer.transport.abort()
        if self._door:
            self._door.close()
        self._channel.close()

    async def _ask(
        self, do: str, head: dict[str, Any], body: bytes = b"", *, timeout_s: float = 60.0
    ) -> tuple[dict[str, Any], bytes]:
        """Ask and wait. One that is cancelled is still answered, before the next is asked."""
        await self._lock.acquire()
        if self._writer is None:
            self._lock.release()
            raise SandboxGoneError("the sandbox is not open")
        self._writer.write(frame.pack({"do": do, **head}, body))
        exchange = asyncio.create_task(self._exchange(do, timeout_s + 30))
        exchange.add_done_callback(self._exchanged)
        try:
            reply = await asyncio.shield(exchange)
        except asyncio.CancelledError:
            if do == "exec":
                self._writer.write(frame.pack({"do": "kill"}))
            raise
        if reply[0].get("error") == "os":
            if do != "read" and reply[0]["errno"] in failure.FULL:
                raise OutOfDiskError(f"{do}: {reply[0]['reason']}")
            raise OSError(reply[0]["errno"], reply[0]["reason"])
        if reply[0].get("error") == "value":
            raise ValueError(reply[0]["reason"])
        if reply[0].get("error") == "setup":
            raise SandboxGoneError(f"the sandbox failed: {reply[0]['reason']}")
        return reply

    def _exchanged(self, exchange: "asyncio.Task[tuple[dict[str, Any], bytes]]") -> None:
        self._lock.release()
        if not exchange.cancelled():
            exchange.exception()

    async def _exchange(self, do: str, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        assert self._writer
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()
                return await self._receive()
        except TimeoutError as error:
            raise SandboxGoneError(f"the sandbox did not answer within {timeout_s:g} s") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise failure.gone(await self._cause(), do) from error

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._reader
        lengths = frame.lengths(await self._reader.readexactly(frame.HEADER_BYTES))
        head = json.loads(await self._reader.readexactly(lengths[0]))
        return head, await self._reader.readexactly(lengths[1])
