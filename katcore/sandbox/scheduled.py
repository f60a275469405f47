"""A backend behind the scheduler: `open` waits for its turn, and the scheduler hears of what failed."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from katcore.config import ScheduleSettings
from katcore.errors import SandboxError
from katcore.protocols import Sandbox, SandboxBackend
from katcore.sandbox.pool import Pool
from katcore.sandbox.scheduler import Scheduler
from katcore.schema.capacity import Capacity
from katcore.schema.task import SandboxSpec


class ScheduledBackend:
    """A backend as one node. Sandboxes of one environment are a group: the rollouts of a task."""

    def __init__(
        self, backend: SandboxBackend, capacity: Capacity, settings: ScheduleSettings
    ) -> None:
        self._backend = backend
        scheduler = Scheduler({"": capacity}, together=settings.together)
        self._pool = Pool(backend, scheduler, settings.warm)

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """See `SandboxBackend.open`; NoCapacityError too if it asks for more than there is altogether."""
        return self._open(spec)

    async def close(self) -> None:
        """See `SandboxBackend.close`."""
        await self._pool.close()
        await self._backend.close()

    @asynccontextmanager
    async def _open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        ready = await self._pool.take(spec)
        try:
            async with ready.stack:
                yield ready.sandbox
        except SandboxError as error:
            self._pool.failed(ready.place, error)
            raise
