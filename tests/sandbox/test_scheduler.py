"""The scheduler under a clock that jumps: no limit passed, none lost, none starved."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katcore.bench.virtual import run_virtual
from katcore.errors import NoCapacityError
from katcore.sandbox.scheduler import Place, Scheduler
from katcore.schema.capacity import Capacity, Demand

SMALL = Demand(memory_mib=1.0)


@dataclass
class Watched:
    """A scheduler, and what was seen of its nodes: checked each time one starts."""

    nodes: dict[str, Capacity]
    together: int = 8
    open: list[Place] = field(default_factory=list)
    started: list[tuple[float, Place]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.nodes, together=self.together)

    async def sandbox(self, demand: Demand, group: str, seconds: float) -> Place:
        async with self.scheduler.placed(demand, group) as place:
            self.open.append(place)
            self.started.append((asyncio.get_running_loop().time(), place))
            self.check(place.node)
            try:
                await asyncio.sleep(seconds)
            finally:
                self.open.remove(place)
        return place

    def check(self, name: str) -> None:
        has = self.nodes[name]
        here = [place.demand for place in self.open if place.node == name]
        assert len(here) <= has.sandboxes
        assert sum(item.memory_mib for item in here) <= has.memory_mib
        assert sum(item.processes for item in here) <= has.processes
        assert sum(item.descriptors for item in here) <= has.descriptors

    def check_rates(self) -> None:
        for name, has in self.nodes.items():
            times = [at for at, place in self.started if place.node == name]
            burst = max(1.0, has.starts_per_s)
            for first in range(len(times)):
                for last in range(first, len(times)):
                    seconds = times[last] - times[first] + 1e-6
                    allowed = burst + seconds * has.starts_per_s
                    assert last - first + 1 <= allowed, (name, times[first], times[last])

    def groups(self) -> list[str]:
        return [place.group for _, place in self.started]


def virtual(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test in virtual time, which ends when nobody waits any more."""

    def run() -> None:
        run_virtual(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@virtual
async def test_no_more_than_fit_are_open_at_once() -> None:
    seen = Watched({"n": Capacity(memory_mib=10)})
    await asyncio.gather(*(seen.sandbox(Demand(3.0), "", 1.0) for _ in range(10)))
    assert [at for at, _ in seen.started] == [0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [3.0]


@pytest.mark.parametrize(
    "has",
    [Capacity(sandboxes=2), Capacity(processes=2), Capacity(descriptors=8), Capacity(memory_mib=2)],
)
def test_each_limit_limits(has: Capacity) -> None:
    async def main() -> None:
        seen = Watched({"n": has})
        demand = Demand(memory_mib=1, processes=1, descriptors=4)
        await asyncio.gather(*(seen.sandbox(demand, "", 1.0) for _ in range(6)))
        assert max(at for at, _ in seen.started) == 2.0

    run_virtual(main())


@virtual
async def test_starts_are_spread_to_the_rate_after_a_burst() -> None:
    seen = Watched({"n": Capacity(starts_per_s=4)})
    await asyncio.gather(*(seen.sandbox(SMALL, "", 60.0) for _ in range(10)))
    assert [round(at, 6) for at, _ in seen.started] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]


@virtual
async def test_less_than_one_start_a_second_is_one_at_a_time() -> None:
    seen = Watched({"n": Capacity(starts_per_s=0.5)})
    await asyncio.gather(*(seen.sandbox(SMALL, "", 0.1) for _ in range(3)))
    assert [round(at, 6) for at, _ in seen.started] == [0, 2, 4]


@virtual
async def test_what_fits_nowhere_is_refused_at_once() -> None:
    seen = Watched({"a": Capacity(memory_mib=4), "b": Capacity(memory_mib=6)})
    with pytest.raises(NoCapacityError, match="of 2 nodes the largest has 6 MiB"):
        await seen.sandbox(Demand(7.0), "", 1.0)
    with pytest.raises(NoCapacityError):
        await Scheduler({}).take(SMALL)


@virtual
async def test_the_emptiest_node_is_chosen() -> None:
    seen = Watched({"a": Capacity(memory_mib=4), "b": Capacity(memory_mib=8)})
    await asyncio.gather(*(seen.sandbox(Demand(1.0), "", 1.0) for _ in range(12)))
    assert [place.node for _, place in seen.started[:3]] == ["a", "b", "b"]
    assert max(at for at, _ in seen.started) == 0.0


@virtual
async def test_groups_run_together_and_take_turns() -> None:
    seen = Watched({"n": Capacity(sandboxes=1)}, together=3)
    await asyncio.gather(
        *(seen.sandbox(SMALL, group, 1.0) for _ in range(6) for group in ("a", "b"))
    )
    assert "".join(seen.groups()) == "aaabbbaaabbb"


@virtual
async def test_a_group_comes_back_to_the_front_while_its_turn_lasts() -> None:
    """As a rollout does that is to be judged."""
    seen = Watched({"n": Capacity(sandboxes=2)}, together=4)

    async def rollout(group: str) -> None:
        await seen.sandbox(SMALL, group, 1.0)
        await seen.sandbox(SMALL, group, 1.5)

    await asyncio.gather(*(rollout(group) for group in "aabbcc"))
    assert "".join(seen.groups()) == "aaaabbbbcccc"


@virtual
async def test_an_endless_group_does_not_starve_another() -> None:
    seen = Watched({"n": Capacity(sandboxes=2)}, together=4)

    async def endless() -> None:
        while True:
            await seen.sandbox(SMALL, "endless", 1.0)

    running = [asyncio.create_task(endless()) for _ in range(10)]
    await asyncio.sleep(5.5)
    await seen.sandbox(SMALL, "other", 1.0)
    waited = next(at for at, place in seen.started if place.group == "other") - 5.5
    assert waited < 3.0
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert not seen.open


@virtual
async def test_a_small_one_passes_a_large_one_but_not_for_ever() -> None:
    seen = Watched({"n": Capacity(memory_mib=4)})

    async def endless(number: int) -> None:
        while True:
            await seen.sandbox(Demand(1.0), f"small-{number}", 1.0 + number / 10)

    running = [asyncio.create_task(endless(number)) for number in range(8)]
    await asyncio.sleep(0.5)
    async with asyncio.timeout(60):
        await seen.sandbox(Demand(4.0), "large", 1.0)
    before = [place.group for _, place in seen.started].index("large")
    assert 8 < before < 80
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@virtual
async def test_one_that_is_cancelled_leaves_its_place_to_others() -> None:
    seen = Watched({"n": Capacity(sandboxes=1)})
    first = asyncio.create_task(seen.sandbox(SMALL, "", 10.0))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(seen.sandbox(SMALL, "", 1.0)) for _ in range(3)]
    await asyncio.sleep(1)
    waiting[0].cancel()
    first.cancel()
    await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [at for at, _ in seen.started] == [0.0, 1.0, 2.0]
    assert seen.scheduler.num_waiting == 0
    assert seen.scheduler.has_room(SMALL)


@virtual
async def test_cancelled_in_the_moment_it_is_placed_it_gives_the_place_back() -> None:
    scheduler = Scheduler({"n": Capacity(sandboxes=1)})
    held = await scheduler.take(SMALL)
    waiting = asyncio.create_task(scheduler.take(SMALL))
    await asyncio.sleep(0)
    scheduler.give_back(held)
    asyncio.get_running_loop().call_soon(waiting.cancel)  # after it was placed, before it knows
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    async with asyncio.timeout(1):
        await scheduler.take(SMALL)


@virtual
async def test_a_node_that_failed_rests_and_others_take_over() -> None:
    scheduler = Scheduler({"a": Capacity(), "b": Capacity()})
    place = await scheduler.take(SMALL)
    assert place.node == "a"
    scheduler.rest(place)
    scheduler.give_back(place)
    assert [(await scheduler.take(SMALL)).node for _ in range(3)] == ["b"] * 3
    await asyncio.sleep(0.6)
    assert (await scheduler.take(SMALL)).node == "a"


@virtual
async def test_a_rest_is_longer_each_time_until_one_works() -> None:
    loop = asyncio.get_running_loop()
    scheduler = Scheduler({"a": Capacity()})
    waited = []
    for _ in range(10):
        place = await scheduler.take(SMALL)
        scheduler.rest(place)
        scheduler.give_back(place)
        before = loop.time()
        place = await scheduler.take(SMALL)
        waited.append(round(loop.time() - before, 6))
        scheduler.give_back(place)
    assert waited == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    scheduler.works(place)
    scheduler.rest(place)
    before = loop.time()
    await scheduler.take(SMALL)
    assert round(loop.time() - before, 6) == 0.5


@virtual
async def test_many_that_fail_together_are_one_failure() -> None:
    loop = asyncio.get_running_loop()
    scheduler = Scheduler({"a": Capacity()})
    places = [await scheduler.take(SMALL) for _ in range(50)]
    await asyncio.sleep(100)
    for place in places:
        scheduler.rest(place)
        scheduler.give_back(place)
    await scheduler.take(SMALL)
    assert loop.time() == 100.5


@virtual
async def test_one_that_is_cancelled_when_its_node_goes_is_no_trouble() -> None:
    scheduler = Scheduler({"a": Capacity(sandboxes=1, memory_mib=8), "b": Capacity(memory_mib=1)})
    held = await scheduler.take(Demand(8.0))
    waiting = asyncio.create_task(scheduler.take(Demand(8.0)))
    await asyncio.sleep(1)
    waiting.cancel()
    scheduler.lose("a")
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    scheduler.give_back(held)
    assert scheduler.num_waiting == 0
    assert scheduler.has_room(SMALL)


@virtual
async def test_who_fits_on_no_node_that_is_left_is_told() -> None:
    scheduler = Scheduler({"a": Capacity(memory_mib=8), "b": Capacity(memory_mib=2)})
    large, small = await scheduler.take(Demand(8.0)), await scheduler.take(Demand(2.0))
    waiting = asyncio.create_task(scheduler.take(Demand(4.0)))
    other = asyncio.create_task(scheduler.take(Demand(1.0)))
    await asyncio.sleep(1)
    scheduler.lose("a")
    with pytest.raises(NoCapacityError):
        await waiting
    scheduler.give_back(large)
    scheduler.give_back(small)
    assert (await other).node == "b"
    scheduler.add("c", Capacity(memory_mib=8))
    assert (await scheduler.take(Demand(8.0))).node == "c"


DEMANDS = st.builds(
    Demand,
    memory_mib=st.integers(0, 8).map(float),
    processes=st.integers(1, 3).map(float),
    descriptors=st.integers(0, 4).map(float),
)
CAPACITIES = st.builds(
    Capacity,
    sandboxes=st.integers(1, 5),
    memory_mib=st.integers(8, 20),
    processes=st.integers(3, 9),
    descriptors=st.integers(4, 12),
    starts_per_s=st.sampled_from([0.3, 1.0, 2.5, 7.0, float("inf")]),
)


@dataclass(frozen=True)
class Wanted:
    """One sandbox: when it is asked for, how long it is used, and when its user gives up."""

    demand: Demand
    group: str
    after_s: float
    seconds: float
    gives_up_after_s: float


WANTED = st.builds(
    Wanted,
    demand=DEMANDS,
    group=st.sampled_from("abcd"),
    after_s=st.sampled_from([0.0, 0.0, 0.5, 3.0]),
    seconds=st.sampled_from([0.0, 0.25, 1.0, 5.0]),
    gives_up_after_s=st.sampled_from([0.0, 0.25, 1.0, 4.0, 1e6, 1e6, 1e6]),
)


async def use(seen: Watched, wanted: Wanted) -> str:
    await asyncio.sleep(wanted.after_s)
    try:
        async with asyncio.timeout(wanted.gives_up_after_s):
            await seen.sandbox(wanted.demand, wanted.group, wanted.seconds)
    except TimeoutError:
        return "gave up"
    return "done"


@settings(max_examples=80)
@given(
    nodes=st.lists(CAPACITIES, min_size=1, max_size=3),
    wanted=st.lists(WANTED, max_size=40),
    together=st.integers(1, 4),
)
def test_all_get_a_place_that_wait_and_no_limit_is_passed(
    nodes: list[Capacity], wanted: list[Wanted], together: int
) -> None:
    async def main() -> Watched:
        seen = Watched({f"n{number}": item for number, item in enumerate(nodes)}, together)
        ended = await asyncio.gather(*(use(seen, item) for item in wanted))
        patient = [item.gives_up_after_s > 1e5 for item in wanted]
        assert all(end == "done" for end, waits in zip(ended, patient, strict=True) if waits)
        return seen

    seen = run_virtual(main())
    seen.check_rates()
    assert not seen.open
    assert seen.scheduler.num_waiting == 0
    assert not seen.scheduler._queue._groups
    for node in seen.scheduler._nodes.values():
        assert (node.num_open, node.memory_mib, node.processes, node.descriptors) == (0, 0, 0, 0)
        assert node.held_for is None


@settings(max_examples=40)
@given(wanted=st.lists(WANTED, min_size=1, max_size=30))
def test_the_same_is_the_same_each_time(wanted: list[Wanted]) -> None:
    async def main() -> list[tuple[float, str, str]]:
        seen = Watched({"a": Capacity(sandboxes=2, starts_per_s=3), "b": Capacity(sandboxes=1)})
        await asyncio.gather(*(use(seen, item) for item in wanted))
        return [(at, place.node, place.group) for at, place in seen.started]

    assert run_virtual(main()) == run_virtual(main())


@settings(max_examples=60)
@given(
    num_groups=st.integers(2, 6),
    size=st.integers(1, 10),
    together=st.integers(1, 5),
    sandboxes=st.integers(1, 4),
)
def test_between_two_turns_of_a_group_each_other_has_one_at_most(
    num_groups: int, size: int, together: int, sandboxes: int
) -> None:
    async def main() -> list[str]:
        seen = Watched({"n": Capacity(sandboxes=sandboxes)}, together)
        names = [str(number) for number in range(num_groups)]
        await asyncio.gather(
            *(seen.sandbox(SMALL, name, 1.0) for name in names for _ in range(size))
        )
        return seen.groups()

    order = run_virtual(main())
    expected = [
        str(name)
        for turn in range(0, size, together)
        for name in range(num_groups)
        for _ in range(min(together, size - turn))
    ]
    assert order == expected


def test_a_simulation_in_which_all_wait_for_ever_says_so() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="nothing can ever happen"):
        run_virtual(main())
