"""Started machines in wait, so that opening one takes no start."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from katcore.errors import KatError

ShapeT = TypeVar("ShapeT")
MachineT = TypeVar("MachineT")

_log = logging.getLogger(__name__)


class Pool(Generic[ShapeT, MachineT]):
    """Keeps `num` machines of each shape that was asked for of late, and at most `most` in all."""

    def __init__(
        self,
        num: int,
        most: int,
        start: Callable[[ShapeT], Awaitable[MachineT]],
        end: Callable[[MachineT], Awaitable[None]],
    ) -> None:
        self._num = num
        self._most = most
        self._start = start
        self._end = end
        self._waiting: dict[ShapeT, list[MachineT]] = {}
        self._starting: Counter[ShapeT] = Counter()
        self._work: set[asyncio.Task[None]] = set()

    def take(self, shape: ShapeT) -> MachineT | None:
        """A machine that waits, or None. Others are started to make up for it."""
        if not self._num:
            return None
        waiting = self._waiting.pop(shape, [])
        self._waiting[shape] = waiting  # the shape that was asked for last is the last
        found = waiting.pop(0) if waiting else None
        task = asyncio.create_task(self._fill(shape))
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return found

    async def close(self) -> None:
        """End all that wait, and start no more."""
        self._num = 0
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        machines = [machine for waiting in self._waiting.values() for machine in waiting]
        self._waiting.clear()
        await asyncio.gather(*map(self._end, machines), return_exceptions=True)

    async def _fill(self, shape: ShapeT) -> None:
        try:
            while len(self._waiting.get(shape, ())) + self._starting[shape] < self._num:
                self._starting[shape] += 1
                try:
                    machine = await self._start(shape)
                finally:
                    self._starting[shape] -= 1
                self._waiting.setdefault(shape, []).append(machine)
                await self._make_room()
        except KatError as error:
            _log.warning("no sandbox is kept ready for now: %s", error)

    async def _make_room(self) -> None:
        """The shapes that were asked for longest ago give up theirs."""
        while sum(map(len, self._waiting.values())) > self._most:
            shape = next(iter(self._waiting))
            machines = self._waiting.pop(shape)
            await asyncio.gather(*map(self._end, machines))
