"""Sandboxes on lease: on record before they are made, so that a killed process leaves nothing for good.

`open_backend` is how everything but a test gets its backend. It puts the process on record as a holder, and
each sandbox as a lease; both are struck out when they end. What a killed holder left is the reaper's.
"""

import asyncio
import json
import logging
import platform
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from os import getpid
from typing import Any

from katcore.config import ScheduleSettings, run_name
from katcore.errors import LedgerError, SandboxError
from katcore.plugin import Plugins
from katcore.protocols import Sandbox, SandboxBackend, SupportsHandle, SupportsReap
from katcore.sandbox import reaper
from katcore.sandbox.demand import capacity_of
from katcore.sandbox.ledger import Ledger
from katcore.sandbox.process import Process
from katcore.sandbox.scheduled import ScheduledBackend
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec

HEARTBEAT_S = 15.0
_SOON_S = 0.5
"""How long what nobody waits for may wait for company: one transaction then does for all."""
_PATIENCE_S = 20.0
_RETRY_S = 0.5

_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_backend(
    plugins: Plugins,
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    work: str = "",
    schedule: ScheduleSettings | None = None,
) -> AsyncIterator[SandboxBackend]:
    """The backend of that name, whose sandboxes are opened in turn and on lease; closed at the end.

    First, what dead processes left is reclaimed. `work` says what the sandboxes are for.

    Raises:
        PluginError, ConfigError: as `Plugins.make`; or the ledger's driver is not installed.
        LedgerError: the ledger cannot be used.
    """
    backend: SandboxBackend = plugins.make("sandbox", name, options)
    settings = schedule or ScheduleSettings()
    capacity = capacity_of(backend, settings)
    ledger = Ledger()
    holder = Holder(
        uuid.uuid4().hex[:12],
        name,
        json.dumps(dict(options or {}), default=str),
        backend.mark() if isinstance(backend, SupportsReap) else "",
        platform.node(),
        str(Process.of(getpid())),
        run_name(),
        work,
    )
    await asyncio.to_thread(ledger.connect)
    register = Register(ledger, holder)
    scheduled = ScheduledBackend(LeasedBackend(backend, register), capacity, settings)
    try:
        await _reclaim(ledger, plugins)
        yield scheduled
    finally:
        # Should this raise, the holder stays on record, and is reaped when this process is dead.
        await scheduled.close()
        await asyncio.to_thread(register.close)


async def _reclaim(ledger: Ledger, plugins: Plugins) -> None:
    try:
        reaped = await reaper.reap(ledger, plugins)
    except SandboxError as error:
        _log.warning("what dead processes left stays for now: %s", error)
    else:
        if reaped.holders:
            _log.warning("reclaimed what %d dead processes left", reaped.holders)


class LeasedBackend:
    """A backend, with each of its sandboxes on record from before it is made until it is destroyed."""

    def __init__(self, backend: SandboxBackend, register: "Register") -> None:
        self._backend = backend
        self._register = register

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """See `SandboxBackend.open`."""
        return self._open(spec)

    async def close(self) -> None:
        """See `SandboxBackend.close`."""
        await self._backend.close()

    @asynccontextmanager
    async def _open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        register = self._register
        lease = Lease(uuid.uuid4().hex[:12], register.holder_id, spec.serves, time.time())
        of_user: BaseException | None = None
        try:
            await register.add(lease)
            async with self._backend.open(spec) as sandbox:
                handle = sandbox.handle() if isinstance(sandbox, SupportsHandle) else ""
                lease = replace(lease, state="running", handle=handle)
                register.put(lease)
                try:
                    yield sandbox
                except BaseException as error:
                    of_user = error
                    raise
        except BaseException as error:
            if lease.state == "running" and error is not of_user:
                # It could not be destroyed: the reaper tries again.
                register.put(replace(lease, state="left"))
            else:
                register.remove(lease.id)
            raise
        else:
            register.remove(lease.id)


class Register:
    """A holder's part of the ledger, written by a thread of its own.

    It writes what is wanted, not what was done: all changes that came meanwhile are one transaction, and
    after a failure the next one makes up for it. The thread also gives the holder's sign of life, which a
    busy event loop must not delay.
    """

    def __init__(self, ledger: Ledger, holder: Holder) -> None:
        self._ledger = ledger
        self._holder = holder
        self._wanted: dict[str, Lease] = {}
        self._waiting: list[Future[None]] = []
        self._written: dict[str, Lease] | None = None
        self._due_s = 0.0
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="katcore-leases", daemon=True)
        self._thread.start()

    @property
    def holder_id(self) -> str:
        """The holder's id in the ledger."""
        return self._holder.id

    async def add(self, lease: Lease) -> None:
        """Put a lease on record; it is there when this returns.

        Raises:
            LedgerError: it cannot be written.
        """
        done: Future[None] = Future()
        with self._changed:
            if self._is_closing:
                raise LedgerError("the backend is closed")
            self._wanted[lease.id] = lease
            self._waiting.append(done)
            self._changed.notify()
        await asyncio.wrap_future(done)

    def put(self, lease: Lease) -> None:
        """Change a lease, soon."""
        with self._changed:
            self._wanted[lease.id] = lease
            self._due_s = min(self._due_s, time.monotonic() + _SOON_S)
            self._changed.notify()

    def remove(self, lease_id: str) -> None:
        """Strike out a lease, soon. What is already destroyed may be on record for a while."""
        with self._changed:
            self._wanted.pop(lease_id, None)
            self._due_s = min(self._due_s, time.monotonic() + _SOON_S)
            self._changed.notify()

    def close(self) -> None:
        """Strike out the holder, but for one that could not destroy all: that waits for the reaper."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        try:
            if not any(lease.state == "left" for lease in self._wanted.values()):
                self._ledger.retire(self._holder)
        except LedgerError as error:
            _log.warning("closed, but still on record until the next reap: %s", error)
        self._ledger.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._is_closing) and (
                    (left_s := self._due_s - time.monotonic()) > 0
                ):
                    self._changed.wait(left_s)
                waiting, self._waiting = self._waiting, []
                wanted = dict(self._wanted)
                is_last, self._due_s = self._is_closing, time.monotonic() + HEARTBEAT_S
            failure = self._write(wanted, patience_s=_PATIENCE_S if waiting else 0)
            for done in waiting:
                if not done.set_running_or_notify_cancel():
                    continue
                if failure:
                    done.set_exception(failure)
                else:
                    done.set_result(None)
            if is_last:
                return

    def _write(self, wanted: dict[str, Lease], *, patience_s: float) -> LedgerError | None:
        until_s = time.monotonic() + patience_s
        while True:
            try:
                self._ledger.save(self._holder, self._written, wanted)
            except Exception as error:  # noqa: BLE001 - who waits has to hear of it, whatever it is
                self._written = None
                if time.monotonic() >= until_s:
                    _log.warning("%s", error)
                    return error if isinstance(error, LedgerError) else LedgerError(repr(error))
                time.sleep(_RETRY_S)
            else:
                self._written = wanted
                return None
