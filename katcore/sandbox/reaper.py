"""Reclaims what killed processes left, and kills sandboxes by their id.

A holder is dead when its process is, which one can see on the same machine; from any other, when it has
given no sign of life for a while. Nothing that is not on record is touched, and nothing of a holder that
lives. What is destroyed is found by the mark of one dead holder, so a second reaper at once does no harm.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from katcore.errors import ConfigError, PluginError, SandboxElsewhereError, SandboxError
from katcore.plugin import Plugins
from katcore.protocols import SandboxBackend, SupportsReap
from katcore.sandbox.ledger import Ledger
from katcore.sandbox.process import Process
from katcore.schema.lease import Holder, Lease

SILENT_S = 120.0
"""Without a sign of life for so long, a holder on another machine is taken for dead."""
_GIVEN_UP_S = 24 * 3600.0
"""What nobody could reclaim for so long is struck out: its machine is gone."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reaped:
    """How many dead holders and leases were struck out, and why others were not."""

    holders: int
    leases: int
    left: tuple[str, ...] = ()


def is_dead(holder: Holder, now_s: float) -> bool:
    """Whether nobody is there any more to destroy what it opened."""
    process = Process.parse(holder.process)
    return not process.is_alive if process.is_here else now_s - holder.seen_s > SILENT_S


async def reap(ledger: Ledger, plugins: Plugins, *, run: str | None = None) -> Reaped:
    """Destroy all that dead holders left (of one scheduled run, if it is given).

    Raises:
        LedgerError: the ledger cannot be read or written.
    """
    holders, leases, now_s = await asyncio.to_thread(ledger.read)
    num_holders = num_leases = 0
    left: list[str] = []
    for holder in holders:
        if run is not None and holder.run != run:
            continue
        own = [lease for lease in leases if lease.holder == holder.id]
        try:
            if is_dead(holder, now_s):
                found = await _sweep(ledger, plugins, holder, now_s)
                num_holders += found is not None
                num_leases += found or 0
            else:
                failed = [lease for lease in own if lease.state == "left"]
                num_leases += await _destroy(ledger, plugins, holder, failed)
        except (SandboxError, PluginError, ConfigError) as error:
            left.append(f"{len(own)} sandboxes of {holder.id} on {holder.host}: {error}")
    return Reaped(num_holders, num_leases, tuple(left))


async def kill(ledger: Ledger, plugins: Plugins, ids: Iterable[str]) -> int:
    """Destroy sandboxes, whoever holds them; how many. An id may be its beginning. None given: all.

    Who uses one gets SandboxGoneError, which is nobody's reward.

    Raises:
        ConfigError: no sandbox has that id, or several have; nothing was destroyed.
        SandboxError: one could not be destroyed.
    """
    holders, leases, _ = await asyncio.to_thread(ledger.read)
    wanted = list(ids)
    chosen = [_one(leases, id_) for id_ in dict.fromkeys(wanted)] if wanted else leases
    by_id = {holder.id: holder for holder in holders}
    num = 0
    for lease in chosen:
        num += await _destroy(ledger, plugins, by_id[lease.holder], [lease])
    return num


def _one(leases: Iterable[Lease], id_: str) -> Lease:
    found = [lease for lease in leases if lease.id.startswith(id_)]
    if len(found) != 1:
        what = "no sandbox has" if not found else f"{len(found)} sandboxes have"
        raise ConfigError(f"{what} an id that begins with {id_!r}; see `kat sandbox list`")
    return found[0]


async def _sweep(ledger: Ledger, plugins: Plugins, holder: Holder, now_s: float) -> int | None:
    try:
        async with _backend_of(plugins, holder) as backend:
            await backend.sweep(holder)
    except SandboxElsewhereError as error:
        if now_s - holder.seen_s < _GIVEN_UP_S:
            raise
        _log.warning("struck out, since nobody has reclaimed it for a day: %s", error)
    return await asyncio.to_thread(ledger.retire, holder)


async def _destroy(
    ledger: Ledger, plugins: Plugins, holder: Holder, leases: Iterable[Lease]
) -> int:
    num = 0
    for lease in leases:
        if not lease.handle:
            raise SandboxError(
                f"{lease.id} is being made, and cannot be found yet: ask again;"
                " if its process is dead, `kat sandbox reap` finds it"
            )
        async with _backend_of(plugins, holder) as backend:
            await backend.destroy(lease)
        await asyncio.to_thread(ledger.strike, lease.id)
        num += 1
    return num


@asynccontextmanager
async def _backend_of(plugins: Plugins, holder: Holder) -> AsyncIterator[SupportsReap]:
    backend: SandboxBackend = plugins.make("sandbox", holder.backend, json.loads(holder.options))
    try:
        if not isinstance(backend, SupportsReap):
            raise SandboxElsewhereError(
                f"backend {holder.backend!r} cannot destroy what another process made"
            )
        yield backend
    finally:
        await backend.close()
