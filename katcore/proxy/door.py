"""A sandbox's door where more than the model is behind it: each connection goes by how it begins."""

import asyncio
import contextlib
import socket
from collections.abc import Coroutine

from aiohttp import web

from katcore.proxy.egress import Egress

_PATIENCE_S = 20.0
_RETRY_S = 0.02
_PEEKED = 64


class Door:
    """Accepts at a door. Requests for a path are the model proxy's; for a host, they are for the way out."""

    def __init__(self, door: socket.socket, runner: web.AppRunner, egress: Egress) -> None:
        self._door = door
        self._runner = runner
        self._egress = egress
        self._tasks: set[asyncio.Task[None]] = set()
        door.setblocking(False)
        self._start(self._accept())

    async def close(self) -> None:
        """Shut it; what is open ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._door.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._door)
            self._start(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        try:
            is_for_a_host = await _is_for_a_host(connection)
        except (OSError, TimeoutError):
            connection.close()
            return
        if is_for_a_host:
            await self._egress.serve(*await asyncio.open_connection(sock=connection))
            return
        loop, server = asyncio.get_running_loop(), self._runner.server
        assert server
        with contextlib.suppress(OSError):
            await loop.connect_accepted_socket(server, connection)


async def _is_for_a_host(connection: socket.socket) -> bool:
    """Looks at the beginning of a request and leaves it there.

    Raises:
        OSError, TimeoutError: none comes.
    """
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            try:
                data = connection.recv(_PEEKED, socket.MSG_PEEK)
            except BlockingIOError:
                data = b" "
            method, _, target = data.partition(b" ")
            if target or len(data) == _PEEKED:
                return method == b"CONNECT" or not target.startswith(b"/")
            if not data:
                raise ConnectionResetError
            await asyncio.sleep(_RETRY_S)
