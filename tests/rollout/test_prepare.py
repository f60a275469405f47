"""What a task's setup leaves is made once, shared by its rollouts, and let go with the last of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from katcore.errors import SandboxGoneError, TaskError
from katcore.protocols import Sandbox
from katcore.rollout.prepare import Preparations
from katcore.schema.rollout import Outcome
from katcore.schema.task import SandboxSpec, Task
from tests.rollout.fakes import FakeBackend, FakeSandbox, a_task
from tests.rollout.test_single import Bench


class Kept(FakeSandbox):
    """With snapshots: what is in its backend's `kept`."""

    kept: dict[str, dict[str, bytes]]

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[str]:
        name = f"s{len(self.kept)}"
        self.kept[name] = dict(self.files)
        yield name
        del self.kept[name]


class KeptBackend(FakeBackend):
    """Opens those."""

    def __init__(self, *fails: dict[str, Exception]) -> None:
        super().__init__(*fails)
        self.kept: dict[str, dict[str, bytes]] = {}
        self.specs: list[SandboxSpec] = []

    @asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        async with super().open(spec) as made:
            self.specs.append(spec)
            assert isinstance(made, FakeSandbox)
            sandbox = Kept(made.fails)
            sandbox.commands = made.commands
            sandbox.kept = self.kept
            sandbox.files = dict(self.kept[spec.snapshot]) if spec.snapshot else {}
            yield sandbox


def prepared(task: Task, command: str = "put ready yes") -> Task:
    return replace(task, setup=command)


async def test_without_a_setup_nothing_is_opened() -> None:
    backend = KeptBackend()
    async with Preparations(backend).of(a_task()) as task:
        assert task == a_task()
    assert not backend.specs


async def test_it_is_made_once_for_all_that_run_and_goes_with_the_last() -> None:
    backend = KeptBackend()
    preparations = Preparations(backend)
    task = prepared(a_task())

    async def rollout(seconds: float) -> dict[str, bytes]:
        async with preparations.of(task) as mine:
            await asyncio.sleep(seconds)
            async with backend.open(mine.sandbox) as sandbox:
                return dict(sandbox.files)  # type: ignore[attr-defined]

    found = await asyncio.gather(*(rollout(number / 100) for number in range(8)))
    assert found == [{"ready": b"yes"}] * 8
    assert len(backend.specs) == 9
    assert backend.num_open == 0
    assert backend.kept == {}
    assert not preparations._prepared


async def test_each_task_has_its_own() -> None:
    backend = KeptBackend()
    preparations = Preparations(backend)
    one, two = prepared(a_task(1)), prepared(a_task(2), "put ready no")
    async with preparations.of(one) as first, preparations.of(two) as second:
        assert first.sandbox.snapshot != second.sandbox.snapshot
        assert backend.kept[second.sandbox.snapshot] == {"ready": b"no"}


async def test_a_setup_that_fails_is_the_task_s_fault() -> None:
    backend = KeptBackend()
    preparations = Preparations(backend)
    with pytest.raises(TaskError, match="t0: its setup exits with 1: no nonsense"):
        async with preparations.of(prepared(a_task(), "nonsense")):
            pass
    assert (backend.num_open, backend.kept, preparations._prepared) == (0, {}, {})


async def test_after_a_failure_the_next_one_makes_it_anew() -> None:
    backend = KeptBackend({"exec": SandboxGoneError("x")})
    preparations = Preparations(backend)
    task = prepared(a_task())
    with pytest.raises(SandboxGoneError):
        async with preparations.of(task):
            pass
    async with preparations.of(task) as mine:
        assert backend.kept[mine.sandbox.snapshot] == {"ready": b"yes"}


async def test_one_that_is_cancelled_does_not_take_it_from_others() -> None:
    backend = KeptBackend()
    preparations = Preparations(backend)
    task = prepared(a_task(), "sleep 0.2")

    async def rollout() -> str:
        async with preparations.of(task) as mine:
            return mine.sandbox.snapshot

    first, second = asyncio.create_task(rollout()), asyncio.create_task(rollout())
    await asyncio.sleep(0.05)
    first.cancel()
    assert await second == "s0"
    assert (backend.num_open, backend.kept) == (0, {})


async def test_when_all_are_cancelled_nothing_stays() -> None:
    backend = KeptBackend()
    preparations = Preparations(backend)
    task = prepared(a_task(), "sleep 60")

    async def rollout() -> None:
        async with preparations.of(task):
            pass

    running = [asyncio.create_task(rollout()) for _ in range(3)]
    await asyncio.sleep(0.05)
    for item in running:
        item.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert (backend.num_open, backend.kept, preparations._prepared) == (0, {}, {})


@pytest.mark.parametrize("kind", [KeptBackend, FakeBackend])
async def test_agent_and_verifier_both_start_from_it(
    tmp_path: Path, kind: type[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With snapshots it is run once, without in each sandbox."""
    monkeypatch.setattr("tests.rollout.test_single.a_task", _ready_task)
    bench = Bench(tmp_path / "calls.jsonl", "get answer", "submit", backend=kind())
    rollout = await bench.run()
    assert (rollout.outcome, rollout.reward) == (Outcome.SCORED, 1.0), rollout.error
    ran = [command[-1] for box in bench.backend.opened for command in box.commands]
    assert ran.count("put answer right") == (1 if kind is KeptBackend else 2)


def _ready_task(*, timeout_s: float) -> Task:
    return prepared(a_task(timeout_s=timeout_s), "put answer right")
