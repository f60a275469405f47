"""The pool: how many wait, which make room, and that none is forgotten."""

import asyncio
from itertools import count

import pytest

from kat_sandboxes.docker.pool import Pool
from katcore.errors import SandboxError


class Machines:
    """Starts and ends numbers."""

    def __init__(self) -> None:
        self.numbers = count()
        self.running: dict[int, str] = {}
        self.is_broken = False

    async def start(self, shape: str) -> int:
        await asyncio.sleep(0)
        if self.is_broken:
            raise SandboxError("no engine")
        number = next(self.numbers)
        self.running[number] = shape
        return number

    async def end(self, number: int) -> None:
        await asyncio.sleep(0)
        del self.running[number]


async def settle(pool: "Pool[str, int]") -> None:
    while pool._work:
        await asyncio.gather(*pool._work)


async def test_so_many_wait_however_many_ask_at_once() -> None:
    machines = Machines()
    pool = Pool(2, 8, machines.start, machines.end)
    assert [pool.take("a") for _ in range(5)] == [None] * 5
    await settle(pool)
    assert sorted(machines.running) == [0, 1]
    assert pool.take("a") == 0
    await settle(pool)
    assert sorted(machines.running) == [0, 1, 2]
    assert pool.take("b") is None, "another shape has its own"
    await pool.close()
    assert list(machines.running) == [0], "what was taken is not the pool's"


async def test_the_shape_asked_for_longest_ago_makes_room() -> None:
    machines = Machines()
    pool = Pool(1, 2, machines.start, machines.end)
    for shape in ("a", "b", "a", "c"):
        if (taken := pool.take(shape)) is not None:
            await machines.end(taken)
        await settle(pool)
    assert sorted(machines.running.values()) == ["a", "c"]
    await pool.close()
    assert machines.running == {}


async def test_closed_while_it_starts_some_it_leaves_none() -> None:
    machines = Machines()
    pool = Pool(3, 8, machines.start, machines.end)
    pool.take("a")
    await asyncio.sleep(0)
    await pool.close()
    assert machines.running == {}
    assert pool.take("a") is None
    assert not pool._work


async def test_a_failure_is_said_and_the_next_may_do(caplog: pytest.LogCaptureFixture) -> None:
    machines = Machines()
    pool = Pool(1, 8, machines.start, machines.end)
    machines.is_broken = True
    pool.take("a")
    await settle(pool)
    assert "no engine" in caplog.text
    machines.is_broken = False
    assert pool.take("a") is None
    await settle(pool)
    assert pool.take("a") == 0
    await pool.close()


async def test_without_a_number_nothing_waits() -> None:
    machines = Machines()
    pool = Pool(0, 8, machines.start, machines.end)
    assert pool.take("a") is None
    assert not pool._work
