"""Many rollouts: bounded concurrency, none lost, infrastructure failures tried again."""

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from katcore.protocols import SandboxBackend
from katcore.retry import rule_for
from katcore.rollout.places import Places
from katcore.rollout.prepare import Preparations
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.schema.rollout import Rollout

_LOG = logging.getLogger(__name__)
_DRAW = random.Random()

Work = tuple[Attempt, Parts]
"""A rollout to be made, and what makes it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How many at once; with `places`, together with all others that take of these, by rank."""

    concurrency: int = 32
    places: Places | None = None
    rank: int = 0


def collect(
    attempts: Iterable[Attempt], parts: Parts, limits: Limits = Limits()
) -> AsyncIterator[Rollout]:
    """Run every attempt; yield one rollout for each, in the order in which they end.

    A rollout that ended in an infrastructure failure is run again under a new id, as `katcore.retry` says;
    what still fails is yielded with its outcome, unscored. Leaving the iteration early cancels what is
    running.
    """
    return collect_mixed(((attempt, parts) for attempt in attempts), parts.backend, limits)


async def collect_mixed(
    work: Iterable[Work], backend: SandboxBackend, limits: Limits = Limits()
) -> AsyncIterator[Rollout]:
    """As `collect`, of attempts with parts of their own, all of one backend."""
    waiting = iter(work)
    preparations = Preparations(backend)
    running: set[asyncio.Task[Rollout]] = set()
    try:
        while True:
            for attempt, parts in waiting:
                trying = _placed(limits, attempt, parts, preparations)
                running.add(asyncio.create_task(trying))
                if len(running) >= limits.concurrency:
                    break
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _placed(
    limits: Limits, attempt: Attempt, parts: Parts, preparations: Preparations
) -> Rollout:
    if limits.places is None:
        return await _persist(attempt, parts, preparations)
    async with limits.places.take(limits.rank):
        return await _persist(attempt, parts, preparations)


async def _persist(attempt: Attempt, parts: Parts, preparations: Preparations) -> Rollout:
    tries = 0
    while True:
        failures: list[Exception] = []
        identifier = _rollout_id(attempt)
        rollout = await run_rollout(identifier, attempt, parts, failures.append, preparations)
        tries += 1
        if not failures or tries > (rule := rule_for(failures[0])).times:
            return rollout
        _LOG.info("%s: try %d failed: %s", rollout.id, tries, rollout.error)
        await asyncio.sleep(rule.delay_s(tries, _DRAW))


def _rollout_id(attempt: Attempt) -> str:
    label = f"{attempt.label}." if attempt.label else ""
    return f"{label}{attempt.task.id}.{attempt.number}.{uuid.uuid4().hex[:8]}"
