"""Many rollouts: bounded concurrency, none lost, infrastructure failures tried again."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.schema.rollout import Outcome, Rollout


@dataclass(frozen=True, slots=True)
class Limits:
    """How many at once, and how often a rollout is tried again that no policy is to blame for."""

    concurrency: int = 32
    max_retries: int = 2


async def collect(
    attempts: Iterable[Attempt], parts: Parts, limits: Limits = Limits()
) -> AsyncIterator[Rollout]:
    """Run every attempt; yield one rollout for each, in the order in which they end.

    A rollout that ended in an infrastructure failure is run again under a new id, up to
    `limits.max_retries` times; what still fails is yielded with its outcome, unscored. Leaving the
    iteration early cancels what is running.
    """
    waiting = iter(attempts)
    running: set[asyncio.Task[Rollout]] = set()
    try:
        while True:
            for attempt in waiting:
                running.add(asyncio.create_task(_persist(attempt, parts, limits.max_retries)))
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


async def _persist(attempt: Attempt, parts: Parts, max_retries: int) -> Rollout:
    for _ in range(max_retries):
        rollout = await run_rollout(_rollout_id(attempt), attempt, parts)
        if rollout.outcome is Outcome.SCORED:
            return rollout
        await asyncio.sleep(0.2)
    return await run_rollout(_rollout_id(attempt), attempt, parts)


def _rollout_id(attempt: Attempt) -> str:
    label = f"{attempt.label}." if attempt.label else ""
    return f"{label}{attempt.task.id}.{attempt.number}.{uuid.uuid4().hex[:8]}"
