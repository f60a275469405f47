"""Rollouts ahead of the trainer: none is too old, all of a step are there, and earlier steps come first."""

import asyncio
import random
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katcore.inference.router import Router
from katcore.pipeline.engines import Engines, Weights
from katcore.pipeline.stream import Stream, staleness_of
from katcore.rollout.places import Places
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Turn, Verdict


def rollout(name: str, *versions: int, num_ids: int = 1) -> Rollout:
    turns = tuple(
        Turn(-1, 0, 0, (1,), (2,) * num_ids, (-0.5,) * num_ids, (), "", str(version))
        for version in versions
    )
    scored = Outcome.SCORED
    return Rollout(name, name, "d", "g", 0, scored, Trajectory(name, turns), Verdict(1.0))


class Policy:
    """Engines whose version is all there is to them."""

    def __init__(self) -> None:
        self.version = -1

        async def hand_over(version: str, weights: Weights) -> None:
            self.version = int(version)

        self.engines = Engines(Router([]), hand_over, is_colocated=False)


@given(st.integers(0, 3), st.integers(1, 7), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=40)
def test_no_token_is_older_than_the_bound_and_steps_are_whole(
    staleness: int, num_steps: int, seed: int
) -> None:
    draw, policy = random.Random(seed), Policy()
    oldest = []

    async def make(step: int) -> list[Rollout]:
        async def one(number: int) -> Rollout:
            versions = []
            for _ in range(3):
                versions.append(policy.version)
                await asyncio.sleep(draw.random() / 500)
            return rollout(f"{step}.{number}", *versions)

        return list(await asyncio.gather(*(one(number) for number in range(4))))

    async def check() -> None:
        async with Stream(make, num_steps, policy.engines, staleness, dict) as stream:
            for step in range(num_steps):
                made, facts = await stream.of(step)
                assert [one.id for one in made] == [f"{step}.{number}" for number in range(4)]
                assert facts["staleness_max"] == staleness_of(made, step)["staleness_max"]
                oldest.append(facts["staleness_max"])
                await stream.run(draw.random)
                await asyncio.sleep(draw.random() / 500)

    asyncio.run(check())
    assert max(oldest) <= staleness
    assert oldest[-1] == min(staleness, num_steps - 1), "the bound is used"


def test_staleness_is_counted_by_tokens() -> None:
    made = [rollout("a", 3, 5, num_ids=2), rollout("b", 5, num_ids=4)]
    assert staleness_of(made, 5) == {"staleness_mean": 0.5, "staleness_max": 2.0}
    assert staleness_of([], 5) == {"staleness_mean": 0.0, "staleness_max": 0.0}


@pytest.mark.parametrize("staleness", [0, 1])
async def test_the_trainer_steps_beside_the_engines_only_with_staleness(staleness: int) -> None:
    policy, begun = Policy(), []

    async def nothing() -> list[Rollout]:
        return []

    def make(step: int) -> Coroutine[Any, Any, list[Rollout]]:
        begun.append(step)
        return nothing()

    async with Stream(make, 4, policy.engines, staleness, dict) as stream:
        for step in range(3):
            await stream.of(step)
            assert begun == list(range(step + 1 + staleness)), "before the step is learnt from"
        where = await stream.run(threading.current_thread)
    assert (where is threading.main_thread()) == (staleness == 0)


async def test_what_fails_ahead_is_told_in_its_turn_and_leaving_stops_the_rest() -> None:
    policy, stopped = Policy(), []

    async def make(step: int) -> list[Rollout]:
        if step == 1:
            raise OSError("the disk is full")
        try:
            await asyncio.sleep(step)
        except asyncio.CancelledError:
            stopped.append(step)
            raise
        return []

    async with Stream(make, 9, policy.engines, 2, dict) as stream:
        await stream.of(0)
        with pytest.raises(OSError, match="disk"):
            await stream.of(1)
    assert stopped == [2]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20))
@settings(deadline=None, max_examples=60)
def test_places_go_to_the_lowest_rank_and_none_is_lost(
    num: int, wanted: list[tuple[int, bool]]
) -> None:
    async def check() -> None:
        places, let, entered = Places(num), asyncio.Event(), []

        async def one(rank: int, number: int) -> None:
            async with places.take(rank):
                entered.append((rank, number))
                await let.wait()

        tasks = [asyncio.create_task(one(rank, at)) for at, (rank, _) in enumerate(wanted)]
        await asyncio.sleep(0)
        assert len(entered) == min(num, len(wanted))
        first, left = len(entered), []
        for task, (at, (rank, is_cancelled)) in zip(tasks, enumerate(wanted), strict=True):
            if is_cancelled:
                task.cancel()
            elif at >= num:
                left.append((rank, at))
        await asyncio.sleep(0)
        let.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert entered[first:] == sorted(left)
        for _ in range(num):
            await asyncio.wait_for(places.take(0).__aenter__(), 1)

    asyncio.run(check())


async def test_the_loop_goes_on_beside_what_takes_long() -> None:
    """A proxy that did not answer meanwhile would have agents run out of time: reward 0 for a save."""
    policy, ticks = Policy(), []

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def none(step: int) -> list[Rollout]:
        return []

    async with Stream(none, 1, policy.engines, 1, dict) as stream:
        ticking = asyncio.create_task(tick())
        await stream.aside(time.sleep, 0.5)
        ticking.cancel()
    assert len(ticks) > 10
