"""Opens sandboxes in their turn, and keeps some ready before they are asked for, where starts are slow.

What is kept ready has its place with the scheduler like any other, and goes first when somebody needs the
room. One that does not answer any more is not handed out.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from katcore.errors import KatError, SandboxError
from katcore.protocols import Sandbox, SandboxBackend
from katcore.retry import Next, rule_for
from katcore.sandbox.demand import demand_of
from katcore.sandbox.scheduler import Place, Scheduler
from katcore.schema.task import SandboxSpec

_KINDS = 8
"""For how many kinds of sandbox some are kept: the tasks that are being worked on."""
_CHECK_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """An open sandbox with its place. Closing `stack` destroys the one and gives back the other."""

    sandbox: Sandbox
    place: Place
    stack: AsyncExitStack

    async def is_healthy(self) -> bool:
        """Whether it still runs commands."""
        try:
            async with asyncio.timeout(2 * _CHECK_S):
                result = await self.sandbox.exec(["true"], timeout_s=_CHECK_S)
        except (KatError, OSError):
            return False
        return result.exit_code == 0

    async def discard(self) -> None:
        """Destroy it unused. Should that fail, it is on record, and the reaper tries again."""
        with contextlib.suppress(KatError):
            await self.stack.aclose()


class Pool:
    """Up to `size` sandboxes for each of the specs last asked for; 0 keeps none."""

    def __init__(self, backend: SandboxBackend, scheduler: Scheduler, size: int) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._size = size
        self._kept: OrderedDict[SandboxSpec, deque[Ready]] = OrderedDict()
        self._filling: dict[SandboxSpec, asyncio.Task[None]] = {}

    async def take(self, spec: SandboxSpec) -> Ready:
        """One that was ready, or a new one in its turn; meanwhile others are made ready.

        Raises:
            SandboxError: as `SandboxBackend.open`.
        """
        if not self._size or spec.snapshot:  # a snapshot goes when its last rollout is done
            return await self._make(spec, str(spec.environment))
        key = replace(spec, serves="")
        self._kept.setdefault(key, deque())
        self._kept.move_to_end(key)
        found = await self._healthy(self._kept[key])
        if found is None:
            await self._make_room(spec)
            found = await self._make(spec, str(spec.environment))
        if key not in self._filling:
            self._filling[key] = asyncio.create_task(self._fill(key))
        return found

    def failed(self, place: Place, error: SandboxError) -> None:
        """A sandbox failed there. If that may be the node's fault, the node gets a rest."""
        if rule_for(error).next is Next.ELSEWHERE:
            self._scheduler.rest(place)

    async def close(self) -> None:
        """Destroy all that is kept."""
        filling = list(self._filling.values())
        for task in filling:
            task.cancel()
        await asyncio.gather(*filling, return_exceptions=True)
        for kept in self._kept.values():
            while kept:
                await kept.popleft().discard()

    async def _healthy(self, kept: deque[Ready]) -> Ready | None:
        while kept:
            found = kept.popleft()
            is_healthy = False
            try:
                is_healthy = await found.is_healthy()
            finally:
                if not is_healthy:
                    await found.discard()
            if is_healthy:
                return found
            _log.warning("one that was kept ready does not answer; the next is taken")
        return None

    async def _make_room(self, spec: SandboxSpec) -> None:
        """Destroy of what is kept, the longest unused first, until there is room or nothing is left."""
        while not self._scheduler.has_room(demand_of(spec)):
            oldest = next((kept for kept in self._kept.values() if kept), None)
            if oldest is None:
                return
            await oldest.popleft().discard()

    async def _fill(self, key: SandboxSpec) -> None:
        """Make what is missing, as long as nobody waits for room; and forget what was not used for long."""
        try:
            while len(self._kept) > _KINDS:
                unused, kept = next(iter(self._kept.items()))
                while kept:
                    await kept.popleft().discard()
                self._kept.pop(unused, None)
            kept = self._kept.get(key, deque(maxlen=0))
            while len(kept) < self._size and self._scheduler.has_room(demand_of(key)):
                made = await self._make(key, "")
                if self._scheduler.num_waiting:
                    await made.discard()
                else:
                    kept.append(made)
        except KatError as error:
            _log.warning("none is kept ready for now: %s", error)
        finally:
            del self._filling[key]

    async def _make(self, spec: SandboxSpec, group: str) -> Ready:
        async with AsyncExitStack() as stack:
            place = await stack.enter_async_context(self._scheduler.placed(demand_of(spec), group))
            try:
                sandbox = await stack.enter_async_context(self._backend.open(spec))
            except SandboxError as error:
                self.failed(place, error)
                raise
            self._scheduler.works(place)
            return Ready(sandbox, place, stack.pop_all())
