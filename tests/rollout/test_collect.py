"""Many rollouts: none lost, few at once, infrastructure failures made good."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katcore.errors import (
    EngineError,
    ImageMissingError,
    NoCapacityError,
    OutOfMemoryError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
    TaskError,
)
from katcore.proxy.server import Proxy
from katcore.retry import Rule
from katcore.rollout.collect import Limits, collect
from katcore.rollout.single import Attempt, Parts
from katcore.scaffold.mini import MiniConfig, MiniScaffold
from katcore.schema.call import EngineRequest, Generation, Sampling
from katcore.schema.rollout import Outcome, Rollout
from tests.proxy.fakes import FakeEngine
from tests.rollout.fakes import FakeBackend, FileVerifier, a_task

ATTEMPTS = 25
_DEFAULT = Limits()


class Solver(FakeEngine):
    """Answers by the turn, however often it is begun anew."""

    async def generate(self, request: EngineRequest) -> Generation:
        number = sum(message.role == "assistant" for message in request.messages)
        return await FakeEngine(*self.answers[number:]).generate(request)


def attempts(num: int = ATTEMPTS, *answers: str | Exception) -> list[Attempt]:
    return [
        Attempt(a_task(n), Solver(*(answers or ("put answer right", "submit"))), label="x")
        for n in range(num)
    ]


async def run(
    log: Path,
    todo: Any,
    backend: FakeBackend,
    limits: Limits = _DEFAULT,
    *,
    stop_after: int = 10**9,
) -> list[Rollout]:
    found: list[Rollout] = []
    async with Proxy(log) as proxy:
        parts = Parts(proxy, backend, MiniScaffold(MiniConfig()), FileVerifier(), Sampling())
        rollouts = collect(todo, parts, limits)
        async for rollout in rollouts:
            found.append(rollout)
            if len(found) == stop_after:
                break
        await rollouts.aclose()  # type: ignore[attr-defined]
        assert not proxy._sessions
    assert backend.num_open == 0
    return found


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "calls.jsonl"


async def test_every_attempt_gives_one_rollout(log: Path) -> None:
    found = await run(log, attempts(), FakeBackend())
    assert Counter(item.task_id for item in found) == {f"t{n}": 1 for n in range(ATTEMPTS)}
    assert all(item.reward == 1.0 for item in found)
    assert all(item.id.startswith(f"x.{item.task_id}.0.") for item in found)


async def test_no_attempts_is_no_rollouts(log: Path) -> None:
    assert await run(log, [], FakeBackend()) == []


@pytest.mark.parametrize("concurrency", [1, 3, 100])
async def test_no_more_than_allowed_run_at_once(log: Path, concurrency: int) -> None:
    backend = FakeBackend()
    taken = 0

    def counted() -> Iterator[Attempt]:
        nonlocal taken
        for attempt in attempts():
            taken += 1
            yield attempt

    found = await run(log, counted(), backend, Limits(concurrency))
    assert len(found) == taken == ATTEMPTS
    assert backend.max_open <= concurrency
    assert backend.max_open >= min(concurrency, 2)


async def test_attempts_are_drawn_as_they_are_needed(log: Path) -> None:
    taken = 0

    def endless() -> Iterator[Attempt]:
        nonlocal taken
        while True:
            taken += 1
            yield attempts(1)[0]

    found = await run(log, endless(), FakeBackend(), Limits(4), stop_after=10)
    assert len(found) == 10
    assert taken <= 10 + 2 * 4


async def test_infrastructure_failures_are_made_good_under_new_ids(log: Path) -> None:
    gone = {"exec": SandboxGoneError("x")}
    backend = FakeBackend(gone, {"open": SandboxGoneError("x")}, {}, gone)
    found = await run(log, attempts(5), backend, Limits(2))
    assert [item.reward for item in found] == [1.0] * 5
    assert len({item.id for item in found}) == 5


async def test_what_still_fails_is_told_unscored(log: Path) -> None:
    backend = FakeBackend(*[{"open": SandboxGoneError("x")}] * 3)
    found = await run(log, attempts(4), backend, Limits(1))
    assert Counter(item.outcome for item in found) == {
        Outcome.SANDBOX_FAILED: 1,
        Outcome.SCORED: 3,
    }
    assert [item.reward for item in found].count(None) == 1


@pytest.mark.parametrize(
    ("error", "num_tries"),
    [
        (ImageMissingError("x"), 1),
        (SandboxUnavailableError("x"), 1),
        (TaskError("x"), 1),
        (OutOfMemoryError("x"), 2),
        (NoCapacityError("x"), 9),
        (SandboxError("x"), 3),
        (ZeroDivisionError("x"), 3),
    ],
)
async def test_it_is_tried_as_often_as_its_failure_deserves_and_never_rewarded(
    log: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, num_tries: int
) -> None:
    monkeypatch.setattr(Rule, "delay_s", lambda *_: 0.0)
    backend = FakeBackend(*[{"open": error}] * 100)
    (found,) = await run(log, attempts(1), backend)
    assert 100 - len(backend.fails) == num_tries
    assert (found.outcome, found.reward) == (Outcome.SANDBOX_FAILED, None)
    assert type(error).__name__ in found.error


async def test_a_failed_task_is_not_tried_again(log: Path) -> None:
    todo = attempts(3, "put answer wrong", "submit")
    backend = FakeBackend()
    found = await run(log, todo, backend)
    assert [item.reward for item in found] == [0.0] * 3
    assert len(backend.opened) == 6, "one to work in and one to be judged in, each"


async def test_a_failing_engine_does_not_stop_the_others(log: Path) -> None:
    bad = Attempt(a_task(99), FakeEngine(*[EngineError("x")] * 9))
    found = await run(log, [bad, *attempts(6)], FakeBackend(), Limits(3))
    assert {item.task_id for item in found if item.reward is None} == {"t99"}
    assert len(found) == 7


async def test_left_early_it_cancels_what_runs(log: Path) -> None:
    todo = [*attempts(2), *attempts(8, "sleep 60")]
    async with asyncio.timeout(20):
        assert len(await run(log, todo, FakeBackend(), Limits(10), stop_after=2)) == 2
