"""One engine over several: who is asked, how many at once, and what happens when one fails."""

import asyncio
import random
from collections.abc import Iterable, Sequence
from math import ceil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katcore.errors import EngineBusyError, EngineError, EngineGoneError, RequestError
from katcore.inference import router as router_module
from katcore.inference.embedded import open_engine
from katcore.inference.router import Router
from katcore.schema.call import EngineRequest, Generation, Message, ScoreRequest, Tool
from tests.inference.tiny import CONTEXT, request


class Fake:
    """Answers with its own number as the id, when it is let; keeps count of its open calls."""

    def __init__(self, number: int, error: Exception | None = None) -> None:
        self.number = number
        self.error = error
        self.version = "0"
        self.num_open = self.num_most = self.num_asked = 0
        self.let = asyncio.Event()
        self.let.set()

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        return (1,)

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        return {number: str(number) for number in ids}

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        return (float(self.number),)

    async def generate(self, request: EngineRequest) -> Generation:
        self.num_asked += 1
        if self.error is not None:
            raise self.error
        self.num_open += 1
        self.num_most = max(self.num_most, self.num_open)
        try:
            await self.let.wait()
        finally:
            self.num_open -= 1
        return Generation((self.number,), (0.0,), "", "stop", self.version)

    async def open(self, report: object) -> None:
        if self.error is not None:
            raise self.error


async def renew(router: Router, version: str) -> None:
    async def change(engine: Fake) -> None:
        if engine.error is not None:
            raise engine.error
        engine.version = version

    await router.renew(change)


async def asked(router: Router, session: str, ids: tuple[int, ...] = (1, 2)) -> int:
    return (await router.generate(request(session, ids))).ids[0]


@given(st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_nobody_has_more_than_its_share_whatever_the_prompts(num: int, prompts: list[int]) -> None:
    async def check() -> None:
        fakes = [Fake(number) for number in range(num)]
        for fake in fakes:
            fake.let.clear()
        router = Router(fakes)
        calls = []
        for number, prompt in enumerate(prompts):
            calls.append(asyncio.create_task(asked(router, f"s{number}", (prompt,))))
            await asyncio.sleep(0)
            most = max(fake.num_open for fake in fakes)
            assert most <= ceil(1.25 * (number + 1) / num)
        for fake in fakes:
            fake.let.set()
        assert len(await asyncio.gather(*calls)) == len(prompts)

    asyncio.run(check())


@given(st.integers(2, 6), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=40)
def test_a_conversation_stays_and_equal_prompts_begin_at_one_place(num: int, seed: int) -> None:
    async def check() -> None:
        router = Router([Fake(number) for number in range(num)])
        draw = random.Random(seed)
        homes: dict[str, int] = {}
        for turn in range(40):
            session = f"s{draw.randrange(8)}"
            ids = (int(session[1:]) % 4, *range(turn if session in homes else 0))
            home = await asked(router, session, ids)
            assert homes.setdefault(session, home) == home
        for session, home in homes.items():
            twin = f"s{(int(session[1:]) + 4) % 8}"
            assert homes.get(twin, home) == home

    asyncio.run(check())


def test_without_one_replica_the_sessions_of_the_others_stay() -> None:
    async def homes(*left: int) -> list[int]:
        router = Router([Fake(number) for number in range(4)])
        for place in router._places:
            if place.number not in left:
                place.error = EngineGoneError("gone")
        return [await asked(router, f"s{number}", (number,)) for number in range(40)]

    before, after = asyncio.run(homes(0, 1, 2, 3)), asyncio.run(homes(0, 1, 3))
    assert set(before) == {0, 1, 2, 3}
    moved = [now for was, now in zip(before, after, strict=True) if was != now]
    assert len(moved) == before.count(2)


@pytest.fixture(autouse=True)
def _short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_FIRST_REST_S", 0.01)
    monkeypatch.setattr(router_module, "_LONGEST_REST_S", 0.02)


async def test_what_a_failed_one_was_asked_is_asked_of_another_until_it_is_back() -> None:
    fakes = [Fake(0), Fake(1)]
    router = Router(fakes)
    home = await asked(router, "s")
    fakes[home].error = EngineGoneError("connection refused")
    assert await asked(router, "s") == 1 - home
    num = fakes[home].num_asked
    await renew(router, "7")
    assert fakes[home].version == "0"
    assert await asked(router, "t") == 1 - home
    assert fakes[home].num_asked == num, "it is left alone"
    fakes[home].error = None
    await asyncio.sleep(0.1)
    assert fakes[home].version == "7", "it got what it had missed"
    assert await asked(router, "s") == 1 - home, "where the prefix is by now"
    assert await asked(router, "u") == home
    await router.close()


async def test_one_that_takes_no_weights_gives_no_answers() -> None:
    fakes = [Fake(0), Fake(1, EngineError("CUDA error"))]
    router = Router(fakes)
    await renew(router, "1")
    answers = [await router.generate(request(f"s{number}", (number,))) for number in range(9)]
    assert {answer.policy_version for answer in answers} == {"1"}
    fakes[0].error = EngineError("CUDA error")
    with pytest.raises(EngineError, match="no replica takes new weights: CUDA error"):
        await renew(router, "2")
    await router.close()


async def test_when_all_have_failed_the_error_is_an_engine_s() -> None:
    router = Router([Fake(number, EngineGoneError("gone")) for number in range(3)])
    for _ in range(2):
        with pytest.raises(EngineGoneError, match="gone"):
            await asked(router, "s")
    await router.close()


class Sleeper(Fake):
    """One that shares its GPUs, and notes when it is on them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.is_awake = True
        self.num_tried = 0
        self.is_tried = asyncio.Event()

    async def sleep(self) -> None:
        if self.error is not None:
            raise self.error
        self.is_awake = False


async def waking(router: Router, version: str) -> None:
    async def change(engine: Sleeper) -> None:
        engine.num_tried += 1
        engine.is_tried.set()
        await engine.let.wait()
        if engine.error is not None:
            raise engine.error
        engine.version, engine.is_awake = version, True

    await router.renew(change)


async def test_while_the_trainer_steps_none_is_opened_again() -> None:
    fakes = [Sleeper(0), Sleeper(1)]
    router = Router(fakes)
    await waking(router, "1")
    home = await asked(router, "s")
    fakes[home].error = EngineGoneError("connection refused")
    assert await asked(router, "s") == 1 - home
    await router.sleep()
    num = fakes[home].num_tried
    fakes[home].error = None
    await router.sleep()
    await asyncio.sleep(0.2)
    assert [fake.is_awake for fake in fakes] == [False, False]
    assert fakes[home].num_tried == num
    await waking(router, "2")
    await asyncio.sleep(0.1)
    assert [(fake.is_awake, fake.version) for fake in fakes] == [(True, "2")] * 2
    assert {await asked(router, f"t{number}", (number,)) for number in range(20)} == {0, 1}
    await router.close()


async def test_who_is_being_opened_sleeps_when_that_is_done() -> None:
    fakes = [Sleeper(0), Sleeper(1)]
    router = Router(fakes)
    await waking(router, "1")
    home = await asked(router, "s")
    fakes[home].error = EngineGoneError("connection refused")
    await asked(router, "s")
    fakes[home].error = None
    fakes[home].let.clear()
    fakes[home].is_tried.clear()
    await fakes[home].is_tried.wait()
    going = asyncio.create_task(router.sleep())
    await asyncio.sleep(0.05)
    assert not going.done(), "the trainer waits for it"
    fakes[home].let.set()
    await going
    assert [fake.is_awake for fake in fakes] == [False, False]
    await router.close()


async def test_one_that_does_not_sleep_is_an_error_unless_it_was_away() -> None:
    router = Router([Sleeper(0), Sleeper(1)])
    router._places[0].engine.error = EngineError("does not sleep")  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="does not sleep"):
        await router.sleep()
    await router.close()


async def test_one_that_is_busy_is_not_away_and_a_wrong_request_is_wrong_everywhere() -> None:
    fakes = [Fake(0, EngineBusyError("later")), Fake(1, EngineBusyError("later"))]
    router = Router(fakes)
    with pytest.raises(EngineBusyError):
        await asked(router, "s")
    assert [fake.num_asked for fake in fakes] == [1, 1]
    assert not any(place.error for place in router._places)
    for fake in fakes:
        fake.error = RequestError("no images")
    with pytest.raises(RequestError):
        await asked(router, "s")
    assert sum(fake.num_asked for fake in fakes) == 3


async def test_idle_time_is_that_without_a_call() -> None:
    fakes = [Fake(0), Fake(1)]
    router = Router(fakes)
    router.idle_share()
    fakes[0].let.clear()
    fakes[1].let.clear()
    call = asyncio.create_task(asked(router, "s"))
    await asyncio.sleep(0.2)
    assert router.idle_share() == pytest.approx(0.5, abs=0.1)
    for fake in fakes:
        fake.let.set()
    await call
    await asyncio.sleep(0.1)
    assert router.idle_share() > 0.9


async def test_two_embedded_engines_say_what_one_says(model_folder: Path) -> None:
    """Conversations of three turns, many at once: the ids are equal, and all calls stay with a prefix."""
    draw = random.Random(3)
    starts = [tuple(draw.choices(range(5, 260), k=draw.randint(2, 20))) for _ in range(12)]

    async def talk(engine: Router, number: int) -> list[tuple[int, ...]]:
        said, ids = [], starts[number]
        for turn in range(3):
            made = await engine.generate(request(f"s{number}", ids))
            said.append(made.ids)
            ids += (*made.ids, 40 + turn)
        return said

    async def every(num: int) -> list[list[tuple[int, ...]]]:
        engines = [open_engine(model_folder, num_slots=12, context=CONTEXT) for _ in range(num)]
        router = Router(engines)
        said = await asyncio.gather(*(talk(router, number) for number in range(len(starts))))
        used = [sum(slot.ids is not None for slot in engine._slots) for engine in engines]
        assert all(used)
        assert sum(used) >= len(starts)
        return list(said)

    assert await every(2) == await every(1)
