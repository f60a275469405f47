"""Leases: a sandbox can be found and destroyed by its handle, and what carries no mark is left alone."""

import os
import platform

import pytest

from katcore.errors import SandboxError
from katcore.protocols import (
    Sandbox,
    SandboxBackend,
    SupportsChanges,
    SupportsDoor,
    SupportsHandle,
    SupportsReap,
)
from katcore.sandbox.process import Process
from katcore.schema.lease import Holder
from katcore.schema.lease import Lease as Record
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import Declared, needs, output


class Lease(Declared):
    """Handles, marks, and whether the declarations are true."""

    async def test_what_is_declared_is_so(self, backend: SandboxBackend, sandbox: Sandbox) -> None:
        assert isinstance(sandbox, SupportsChanges) == self.has_changes
        assert isinstance(sandbox, SupportsDoor) == self.has_door
        assert isinstance(sandbox, SupportsHandle) == self.can_reap
        assert isinstance(backend, SupportsReap) == self.can_reap

    @needs("can_reap")
    async def test_the_mark_stays_the_same(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        assert isinstance(backend, SupportsReap)
        before = backend.mark()
        assert before
        async with backend.open(spec):
            assert backend.mark() == before

    @needs("can_reap")
    async def test_the_handle_is_enough_to_destroy_it_and_it_alone(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        assert isinstance(backend, SupportsReap)
        async with backend.open(spec) as other:
            async with backend.open(spec) as sandbox:
                assert _handle(sandbox) != _handle(other)
                assert _handle(sandbox) == _handle(sandbox)
                await backend.destroy(_record(sandbox))
                with pytest.raises(SandboxError):
                    await sandbox.exec(["true"])
                await backend.destroy(_record(sandbox))
            assert await output(other, "echo on") == "on"

    @needs("can_reap")
    async def test_what_is_closed_can_be_destroyed_once_more(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        assert isinstance(backend, SupportsReap)
        async with backend.open(spec) as sandbox:
            record = _record(sandbox)
        await backend.destroy(record)

    @needs("can_reap")
    async def test_a_mark_that_nothing_carries_is_swept_without_harm(
        self, backend: SandboxBackend, sandbox: Sandbox
    ) -> None:
        assert isinstance(backend, SupportsReap)
        mark = "".join(reversed(backend.mark()))
        own = str(Process.of(os.getpid()))
        await backend.sweep(Holder("h", "any", "{}", mark, platform.node(), own))
        assert await output(sandbox, "echo on") == "on"


def _handle(sandbox: Sandbox) -> str:
    assert isinstance(sandbox, SupportsHandle)
    return sandbox.handle()


def _record(sandbox: Sandbox) -> Record:
    return Record("l", "h", state="running", handle=_handle(sandbox))
