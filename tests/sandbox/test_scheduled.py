"""A backend behind the scheduler, and what is kept ready."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from katcore.bench.virtual import run_virtual
from katcore.config import ScheduleSettings
from katcore.errors import (
    EvictedError,
    NoCapacityError,
    SandboxError,
    SandboxGoneError,
    SandboxTimeoutError,
)
from katcore.protocols import Sandbox
from katcore.sandbox.demand import capacity_of
from katcore.sandbox.scheduled import ScheduledBackend
from katcore.schema.capacity import Capacity
from katcore.schema.task import SandboxSpec
from tests.rollout.fakes import FakeBackend, FakeSandbox

SPEC = SandboxSpec(Path("/one"))
OTHER = SandboxSpec(Path("/other"))


class SlowBackend(FakeBackend):
    """Takes two seconds to open one."""

    @asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        await asyncio.sleep(2.0)
        async with super().open(spec) as sandbox:
            yield sandbox

    def capacity(self) -> Capacity:
        return Capacity(memory_mib=1000, processes=500, descriptors=77)


def scheduled(
    backend: FakeBackend, *, sandboxes: float = 8, warm: int = 0
) -> tuple[FakeBackend, ScheduledBackend]:
    settings = ScheduleSettings(warm=warm)
    return backend, ScheduledBackend(backend, Capacity(sandboxes=sandboxes), settings)


async def use(backend: ScheduledBackend, spec: SandboxSpec, seconds: float = 1.0) -> float:
    """How long it took to open."""
    loop = asyncio.get_running_loop()
    asked_s = loop.time()
    async with backend.open(spec):
        opened_s = loop.time()
        await asyncio.sleep(seconds)
    return opened_s - asked_s


def free(backend: ScheduledBackend) -> bool:
    """Nothing is placed any more."""
    scheduler = backend._pool._scheduler
    return not scheduler._queue._groups and all(
        node.num_open == 0 for node in scheduler._nodes.values()
    )


def test_no_more_are_open_than_there_is_room_for() -> None:
    async def main() -> None:
        made, backend = scheduled(FakeBackend(), sandboxes=3)
        waited = await asyncio.gather(*(use(backend, SPEC) for _ in range(7)))
        assert made.max_open == 3
        assert waited == [0, 0, 0, 1, 1, 1, 2]
        assert free(backend)

    run_virtual(main())


def test_what_a_backend_has_is_overcommitted_unless_a_setting_says_how_much() -> None:
    backend = SlowBackend()
    found = capacity_of(backend, ScheduleSettings(overcommit=3))
    assert found == Capacity(memory_mib=3000, processes=1500, descriptors=77)
    settings = ScheduleSettings(max_open=5, memory_mib=200, starts_per_s=2)
    found = capacity_of(backend, settings)
    assert (found.sandboxes, found.memory_mib, found.starts_per_s) == (5, 200, 2)
    assert capacity_of(FakeBackend(), ScheduleSettings()) == Capacity()


def test_one_that_asks_for_more_than_there_is_is_refused() -> None:
    async def main() -> None:
        backend = ScheduledBackend(FakeBackend(), Capacity(memory_mib=256), ScheduleSettings())
        with pytest.raises(NoCapacityError):
            await use(backend, SPEC)

    run_virtual(main())


@pytest.mark.parametrize(
    ("error", "waited_s"), [(EvictedError("x"), 0.5), (SandboxTimeoutError("x"), 0.0)]
)
@pytest.mark.parametrize("warm", [0, 1])
def test_after_a_failure_of_the_node_it_rests(
    error: SandboxError, waited_s: float, warm: int
) -> None:
    async def main() -> None:
        _, backend = scheduled(FakeBackend(), warm=warm)

        async def fails() -> None:
            async with backend.open(SPEC):
                raise error

        with pytest.raises(type(error)):
            await fails()
        assert await use(backend, OTHER) == waited_s
        await backend.close()

    run_virtual(main())


def test_one_that_cannot_be_opened_gives_its_place_back() -> None:
    async def main() -> None:
        _, backend = scheduled(FakeBackend({"open": SandboxGoneError("x")}), sandboxes=1)
        with pytest.raises(SandboxGoneError):
            await use(backend, SPEC)
        assert free(backend)
        assert await use(backend, SPEC) == 0

    run_virtual(main())


def test_the_second_of_a_task_is_ready_and_others_are_not() -> None:
    async def main() -> None:
        made, backend = scheduled(SlowBackend(), warm=2)
        assert await use(backend, SPEC, 9.0) == 2
        assert made.num_open == 2
        both = await asyncio.gather(*(use(backend, replace(SPEC, serves=f"r{n}")) for n in "12"))
        assert both == [0, 0]
        assert await use(backend, OTHER) == 2
        assert await use(backend, replace(SPEC, memory_mib=1024)) == 2
        await backend.close()
        assert made.num_open == 0
        assert free(backend)

    run_virtual(main())


def test_a_sandbox_is_never_handed_out_twice() -> None:
    async def main() -> None:
        _, backend = scheduled(SlowBackend(), warm=2)
        seen: list[Sandbox] = []
        for _ in range(10):
            async with backend.open(SPEC) as sandbox:
                seen.append(sandbox)
                await asyncio.sleep(3)
        assert len(set(map(id, seen))) == 10
        await backend.close()

    run_virtual(main())


def test_what_is_ready_gives_way_when_room_is_needed() -> None:
    async def main() -> None:
        made, backend = scheduled(SlowBackend(), sandboxes=3, warm=2)
        await use(backend, SPEC, 9.0)
        assert made.num_open == 2
        waited = await asyncio.gather(*(use(backend, OTHER, 5.0) for _ in range(3)))
        assert max(waited) == 2, "all three at once"
        await backend.close()
        assert free(backend)

    run_virtual(main())


def test_none_is_made_ready_while_others_wait() -> None:
    async def main() -> None:
        made, backend = scheduled(SlowBackend(), sandboxes=2, warm=2)
        async with asyncio.timeout(300):
            await asyncio.gather(
                *(use(backend, SandboxSpec(Path(f"/{number}"))) for number in range(40))
            )
        assert made.max_open <= 2
        await backend.close()
        assert free(backend)

    run_virtual(main())


def test_one_that_does_not_answer_any_more_is_not_handed_out() -> None:
    async def main() -> None:
        made, backend = scheduled(FakeBackend({}, {"exec": SandboxGoneError("x")}, {}), warm=1)
        await use(backend, SPEC)
        async with backend.open(SPEC) as sandbox:
            assert isinstance(sandbox, FakeSandbox)
            assert not sandbox.fails
        await backend.close()
        assert made.num_open == 0
        assert free(backend)

    run_virtual(main())


def test_of_many_tasks_only_the_last_few_have_some_ready() -> None:
    async def main() -> None:
        made, backend = scheduled(FakeBackend(), sandboxes=100, warm=1)
        for number in range(30):
            await use(backend, SandboxSpec(Path(f"/{number}")))
        assert made.num_open <= 9
        await backend.close()
        assert made.num_open == 0

    run_virtual(main())


@pytest.mark.parametrize("after_s", [0.0, 1.0, 2.0, 3.0, 5.0])
def test_whoever_is_cancelled_leaves_nothing(after_s: float) -> None:
    async def main() -> None:
        made, backend = scheduled(SlowBackend(), sandboxes=3, warm=1)
        running = [asyncio.create_task(use(backend, SPEC, 2.0)) for _ in range(12)]
        await asyncio.sleep(after_s)
        for task in running[::2]:
            task.cancel()
        ended = await asyncio.gather(*running, return_exceptions=True)
        assert [type(item) for item in ended[1::2]] == [float] * 6
        await backend.close()
        assert made.num_open == 0
        assert free(backend)

    run_virtual(main())
