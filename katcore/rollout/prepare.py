"""What a task's `setup` leaves: made once, and where all rollouts of the task start.

A prepared state is kept as long as a rollout of its task runs, which is while its group does. Where sandboxes
have no snapshots, `setup` is run in each of them instead.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

from katcore.errors import TaskError
from katcore.protocols import Sandbox, SandboxBackend, SupportsSnapshot
from katcore.schema.task import Task

_SETUP_S = 600.0
_SHOWN = 300


@dataclass(slots=True, eq=False)
class _Prepared:
    making: "asyncio.Task[str]"
    stack: AsyncExitStack
    users: int = 0

    @property
    def has_failed(self) -> bool:
        """Who comes next tries anew."""
        making = self.making
        return making.done() and (making.cancelled() or making.exception() is not None)


@dataclass(frozen=True, slots=True)
class Preparations:
    """The prepared states of one backend's tasks."""

    backend: SandboxBackend
    _prepared: dict[str, _Prepared] = field(default_factory=dict)

    @asynccontextmanager
    async def of(self, task: Task) -> AsyncIterator[Task]:
        """The task with a sandbox spec that starts where its setup ended.

        Raises:
            TaskError: its setup fails.
            SandboxError: as `SandboxBackend.open` and `Sandbox.exec`.
        """
        if not task.setup:
            yield task
            return
        prepared = self._prepared.get(task.id)
        if prepared is None or prepared.has_failed:
            prepared = self._begin(task)
        prepared.users += 1
        try:
            snapshot = await asyncio.shield(prepared.making)
            yield replace(task, sandbox=replace(task.sandbox, snapshot=snapshot))
        finally:
            prepared.users -= 1
            if not prepared.users:
                if self._prepared.get(task.id) is prepared:
                    del self._prepared[task.id]
                prepared.making.cancel()
                await asyncio.wait({prepared.making})
                await prepared.stack.aclose()

    def _begin(self, task: Task) -> _Prepared:
        stack = AsyncExitStack()
        prepared = _Prepared(asyncio.create_task(self._make(task, stack)), stack)
        self._prepared[task.id] = prepared
        return prepared

    async def _make(self, task: Task, stack: AsyncExitStack) -> str:
        async with self.backend.open(task.sandbox) as sandbox:
            if not isinstance(sandbox, SupportsSnapshot):
                return ""
            await run_setup(task, sandbox)
            return await stack.enter_async_context(sandbox.snapshot())


async def set_up(task: Task, sandbox: Sandbox) -> None:
    """Run the task's setup in a sandbox that did not start from its prepared state.

    Raises:
        TaskError: it fails.
    """
    if task.setup and not task.sandbox.snapshot:
        await run_setup(task, sandbox)


async def run_setup(task: Task, sandbox: Sandbox) -> None:
    """Run the task's setup.

    Raises:
        TaskError: it fails.
    """
    result = await sandbox.exec(["sh", "-c", task.setup], timeout_s=_SETUP_S)
    if result.exit_code:
        said = (result.stdout + result.stderr)[-_SHOWN:].decode(errors="replace")
        raise TaskError(f"{task.id}: its setup exits with {result.exit_code}: {said}")
