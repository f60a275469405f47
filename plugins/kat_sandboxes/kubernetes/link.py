"""Messages over a stream that may break: what one end has not got is sent again over the next stream.

Both ends count messages. A new stream begins with how many each has got, so that none is lost or seen twice.
Standard library only: one end is in a pod (see `relay`), the other in the backend (see `tunnel`).
"""

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from kat_sandboxes.zygote import frame

MACHINE = 0
"""The stream number of the machine's channel; connections to its door have others."""
PIECE = 1 << 16
_WINDOW = 1 << 20
"""How many bytes may be on their way; who has more to send waits."""
_ACK_BYTES = 1 << 18


class Stream(Protocol):
    """Bytes to and fro. Raises OSError or EOFError at its end."""

    async def readexactly(self, n: int, /) -> bytes:
        """So many bytes."""

    async def write(self, data: bytes) -> None:
        """Send; waits while the other end is slow."""


class Link:
    """One end. `deal` is given each message once, in order."""

    def __init__(self, deal: Callable[[dict[str, Any], bytes], Awaitable[None]]) -> None:
        self._deal = deal
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._forgotten = 0
        self._got = 0
        self._unsaid = 0
        self._replies: deque[bytes] = deque()
        self._more = asyncio.Event()
        self._less = asyncio.Event()

    async def send(self, head: dict[str, Any], body: bytes = b"") -> None:
        """Send a message, now or over the next stream. Waits while too much is on its way."""
        while self._kept_bytes >= _WINDOW:
            self._less.clear()
            await self._less.wait()
        text = frame.pack(head, body)
        self._kept.append(text)
        self._kept_bytes += len(text)
        self._more.set()

    async def flushed(self) -> None:
        """Wait until the other end has got all."""
        while self._kept:
            self._less.clear()
            await self._less.wait()

    def ask(self) -> None:
        """Let the other end give a sign of life."""
        self._reply(ask=True)

    async def serve(self, stream: Stream) -> None:
        """Send and receive over a stream until it ends.

        Raises:
            OSError, EOFError: it has ended.
        """
        await stream.write(frame.pack({"got": self._got}))
        head, _ = await _receive(stream)
        self._forget(head["got"])
        self._replies.clear()
        work = [asyncio.create_task(self._write(stream)), asyncio.create_task(self._read(stream))]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in work:
                task.cancel()
            ends = await asyncio.gather(*work, return_exceptions=True)
        for end in ends:
            if end and not isinstance(end, asyncio.CancelledError):
                raise end

    async def _write(self, stream: Stream) -> None:
        num = self._forgotten
        while True:
            if self._replies:
                await stream.write(self._replies.popleft())
            elif num < self._forgotten + len(self._kept):
                num += 1
                await stream.write(self._kept[num - 1 - self._forgotten])
            else:
                self._more.clear()
                await self._more.wait()

    async def _read(self, stream: Stream) -> None:
        while True:
            head, body = await _receive(stream)
            if "got" in head:
                self._forget(head["got"])
                if head.get("ask"):
                    self._reply()
                continue
            self._got += 1
            self._unsaid += len(body) + frame.HEADER_BYTES
            await self._deal(head, body)
            if self._unsaid >= _ACK_BYTES or head.get("end"):
                self._reply()

    def _reply(self, **more: bool) -> None:
        self._unsaid = 0
        self._replies.append(frame.pack({"got": self._got, **more}))
        self._more.set()

    def _forget(self, num: int) -> None:
        while self._forgotten < num:
            self._kept_bytes -= len(self._kept.popleft())
            self._forgotten += 1
        self._less.set()


async def _receive(stream: Stream) -> tuple[dict[str, Any], bytes]:
    head, body = frame.lengths(await stream.readexactly(frame.HEADER_BYTES))
    return json.loads(await stream.readexactly(head)), await stream.readexactly(body)
