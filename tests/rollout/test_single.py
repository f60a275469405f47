"""One rollout: what is rewarded, and whose fault it is when nothing can be."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from katcore.errors import (
    EngineError,
    SandboxGoneError,
    SandboxUnavailableError,
    ScaffoldError,
    VerifierError,
)
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.scaffold.mini import MiniConfig, MiniScaffold
from katcore.schema.call import EngineRequest, Generation, Sampling
from katcore.schema.rollout import Outcome, Rollout, Verdict
from katcore.trajectory.calls import read_calls
from tests.proxy.fakes import FakeEngine
from tests.rollout.fakes import FailingScaffold, FakeBackend, FileVerifier, a_task

SOLVE = ("put answer right", "submit")
MINI = MiniScaffold(MiniConfig())


class SlowEngine(FakeEngine):
    """Takes two seconds for its first answer."""

    async def generate(self, request: EngineRequest) -> Generation:
        if not self.requests:
            await asyncio.sleep(2.0)
        return await super().generate(request)


class Bench:
    """Runs one rollout, then checks that nothing is left open."""

    def __init__(self, log: Path, *answers: str | Exception, **parts: Any) -> None:
        self.log = log
        self.engine = FakeEngine(*(answers or SOLVE))
        self.backend: FakeBackend = parts.pop("backend", FakeBackend())
        self.scaffold = parts.pop("scaffold", MINI)
        self.verifier = parts.pop("verifier", FileVerifier())
        self.budget = parts.pop("budget", Budget())
        self.timeout_s = parts.pop("timeout_s", 10.0)

    async def run(self) -> Rollout:
        async with Proxy(self.log) as proxy:
            parts = Parts(
                proxy, self.backend, self.scaffold, self.verifier, Sampling(), self.budget
            )
            task = a_task(timeout_s=self.timeout_s)
            try:
                return await run_rollout("r1", Attempt(task, self.engine, 4), parts)
            finally:
                assert not proxy._sessions
                assert self.backend.num_open == 0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "calls.jsonl"


async def test_solved_is_a_reward_of_one(log: Path) -> None:
    bench = Bench(log)
    rollout = await bench.run()
    assert (rollout.outcome, rollout.reward, rollout.error) == (Outcome.SCORED, 1.0, "")
    assert (rollout.id, rollout.task_id, rollout.domain, rollout.group) == ("r1", "t0", "d", "g")
    assert (rollout.attempt, rollout.exit_reason) == (4, "submitted")
    assert [turn.text for turn in rollout.trajectory.turns] == list(SOLVE)
    assert set(rollout.seconds) == {"open", "agent", "changes", "verify"}
    assert {call.session_id for call in read_calls(log)} == {"r1"}


async def test_not_solved_is_a_reward_of_zero(log: Path) -> None:
    rollout = await Bench(log, "put answer wrong", "submit").run()
    assert (rollout.outcome, rollout.reward) == (Outcome.SCORED, 0.0)


async def test_it_is_judged_in_a_fresh_sandbox(log: Path) -> None:
    bench = Bench(log)
    await bench.run()
    _, second = bench.backend.opened
    assert bench.verifier.seen[0][0] is second
    assert second.files == {"answer": b"right"}
    assert not second.commands


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"budget": Budget(max_calls=1)}, "budget"),
        ({"scaffold": MiniScaffold(MiniConfig(max_turns=1))}, "turns"),
    ],
)
async def test_what_was_done_before_a_limit_is_judged(
    log: Path, parts: dict[str, Any], reason: str
) -> None:
    rollout = await Bench(log, **parts).run()
    assert (rollout.reward, rollout.exit_reason) == (1.0, reason)


async def test_what_was_done_before_the_time_limit_is_judged(log: Path) -> None:
    rollout = await Bench(log, "put answer right", "sleep 60", timeout_s=0.5).run()
    assert (rollout.reward, rollout.exit_reason) == (1.0, "time")


async def test_waiting_for_a_slow_engine_is_not_the_agent_s_time(log: Path) -> None:
    bench = Bench(log, timeout_s=1.5)
    bench.engine = SlowEngine(*SOLVE)
    rollout = await bench.run()
    assert rollout.seconds["agent"] > 2.0
    assert (rollout.reward, rollout.exit_reason) == (1.0, "submitted")


async def test_the_agent_s_own_time_still_counts_after_a_wait(log: Path) -> None:
    bench = Bench(log, timeout_s=1.5)
    bench.engine = SlowEngine("put answer right", "sleep 60")
    rollout = await bench.run()
    assert (rollout.reward, rollout.exit_reason) == (1.0, "time")
    assert 3.4 < rollout.seconds["agent"] < 30


_BOOM = RuntimeError("boom")


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        ({"answers": [EngineError("no memory")]}, Outcome.ENGINE_FAILED),
        ({"answers": [_BOOM]}, Outcome.ENGINE_FAILED),
        ({"answers": ["put answer right", EngineError("later")]}, Outcome.ENGINE_FAILED),
        ({"backend": FakeBackend({"open": SandboxUnavailableError("x")})}, Outcome.SANDBOX_FAILED),
        ({"backend": FakeBackend({"open": _BOOM})}, Outcome.SANDBOX_FAILED),
        ({"backend": FakeBackend({"exec": SandboxGoneError("x")})}, Outcome.SANDBOX_FAILED),
        ({"backend": FakeBackend({"changes": OSError("x")})}, Outcome.SANDBOX_FAILED),
        ({"backend": FakeBackend({}, {"open": SandboxGoneError("x")})}, Outcome.VERIFIER_FAILED),
        ({"backend": FakeBackend({}, {"apply": OSError("x")})}, Outcome.VERIFIER_FAILED),
        ({"backend": FakeBackend({}, {"read": SandboxGoneError("x")})}, Outcome.VERIFIER_FAILED),
        ({"scaffold": FailingScaffold(MINI, ScaffoldError("x"))}, Outcome.SCAFFOLD_FAILED),
        ({"scaffold": FailingScaffold(MINI, _BOOM)}, Outcome.SCAFFOLD_FAILED),
        ({"scaffold": FailingScaffold(MINI, SandboxGoneError("x"))}, Outcome.SANDBOX_FAILED),
        ({"verifier": FileVerifier(VerifierError("x"))}, Outcome.VERIFIER_FAILED),
        ({"verifier": FileVerifier(_BOOM)}, Outcome.VERIFIER_FAILED),
        ({"verifier": FileVerifier(Verdict(None, "cannot say"))}, Outcome.VERIFIER_FAILED),
    ],
)
async def test_a_failure_is_never_a_reward(
    log: Path, parts: dict[str, Any], outcome: Outcome
) -> None:
    given = dict(parts)
    rollout = await Bench(log, *given.pop("answers", ()), **given).run()
    assert rollout.outcome is outcome
    assert rollout.reward is None
    assert rollout.verdict == Verdict(None)
    assert rollout.error


async def test_a_full_disk_is_no_reward(tmp_path: Path) -> None:
    (tmp_path / "calls.jsonl").symlink_to("/dev/full")
    rollout = await Bench(tmp_path / "calls.jsonl").run()
    assert (rollout.outcome, rollout.reward) == (Outcome.ENGINE_FAILED, None)
    assert "call log" in rollout.error


async def test_what_was_said_before_a_failure_is_kept(log: Path) -> None:
    rollout = await Bench(log, "put a b", EngineError("no memory")).run()
    assert [turn.text for turn in rollout.trajectory.turns] == ["put a b"]
    assert "no memory" in rollout.error


async def test_cancelled_it_leaves_nothing_open(log: Path) -> None:
    for command in ("sleep 60", "put answer right"):
        bench = Bench(log, command)
        if command != "sleep 60":
            bench.engine.go.clear()
        running = asyncio.create_task(bench.run())
        while not bench.engine.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        bench.engine.go.set()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert bench.backend.num_open == 0


async def test_a_canary_that_was_read_makes_the_reward_zero(log: Path) -> None:
    task = replace(a_task(), canaries=("/solution/solve.sh",))
    for commands, reward in ((SOLVE, 1.0), (("get /solution/solve.sh", *SOLVE), 0.0)):
        bench = Bench(log, *commands)
        async with Proxy(bench.log) as proxy:
            parts = Parts(proxy, bench.backend, MINI, FileVerifier(), Sampling())
            rollout = await run_rollout("r1", Attempt(task, bench.engine), parts)
        assert (rollout.outcome, rollout.reward) == (Outcome.SCORED, reward)
        flags = [flag.kind for flag in rollout.verdict.flags]
        assert flags == ([] if reward else ["canary"])
        if not reward:
            assert rollout.verdict.metrics == {"unflagged": 1.0}
            assert "turn 1" in rollout.verdict.flags[0].detail
