"""One task, once: sandbox, agent, changes, fresh sandbox, verdict. Failures say whose fault they were."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from katcore.errors import (
    EngineError,
    InfrastructureError,
    ProxyError,
    SandboxError,
    ScaffoldError,
    VerifierError,
)
from katcore.protocols import (
    Engine,
    RunsInside,
    Sandbox,
    SandboxBackend,
    Scaffold,
    SupportsChanges,
    SupportsDoor,
    Verifier,
)
from katcore.proxy.egress import Egress
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, Session, SessionSpec
from katcore.rollout import live
from katcore.rollout.canary import Canaries, plant
from katcore.rollout.prepare import Preparations, set_up
from katcore.rollout.reaching import Reaching
from katcore.schema.call import Sampling
from katcore.schema.rollout import (
    ExecResult,
    Flag,
    ModelEndpoint,
    Outcome,
    Rollout,
    Trajectory,
    Verdict,
)
from katcore.schema.task import SandboxSpec, Task
from katcore.trajectory.tree import build_trajectory

_LOG = logging.getLogger(__name__)
_SHOWN = 300
_POLL_S = 1.0
_GRACE_S = 30.0
"""How long an agent may take to stop that was told that its budget is spent."""
_FAULTS: tuple[tuple[type[InfrastructureError], Outcome], ...] = (
    (EngineError, Outcome.ENGINE_FAILED),
    (ProxyError, Outcome.ENGINE_FAILED),
    (SandboxError, Outcome.SANDBOX_FAILED),
    (ScaffoldError, Outcome.SCAFFOLD_FAILED),
    (VerifierError, Outcome.VERIFIER_FAILED),
)


@dataclass(frozen=True, slots=True)
class Parts:
    """What all rollouts of one collection share."""

    proxy: Proxy
    backend: SandboxBackend
    scaffold: Scaffold
    verifier: Verifier
    sampling: Sampling
    budget: Budget = field(default_factory=Budget)
    scaffold_name: str = ""
    is_training: bool = True


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rollout to be made. `label` goes into its id: "rl-12", "demo-careful"."""

    task: Task
    engine: Engine
    number: int = 0
    label: str = ""


@dataclass(slots=True)
class _Progress:
    scaffold: str
    phase: str = "open"
    exit_reason: str = ""
    verdict: Verdict = field(default_factory=lambda: Verdict(None))
    canaries: Canaries = field(default_factory=lambda: Canaries(""))
    flags: tuple[Flag, ...] = ()
    egress: Egress | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def enter(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self.phase] = round(now - self.since, 4)
        self.phase, self.since = phase, now


async def run_rollout(
    rollout_id: str,
    attempt: Attempt,
    parts: Parts,
    on_failure: Callable[[Exception], None] = lambda error: None,
    preparations: Preparations | None = None,
) -> Rollout:
    """Run it to its end. Only cancellation leaves this function as an exception.

    `on_failure` is told the error of one that is not scored. `preparations` are shared by the rollouts of a
    task.
    """
    spec = SessionSpec(
        rollout_id,
        attempt.engine,
        parts.sampling,
        parts.budget,
        is_training=parts.is_training,
    )
    session, endpoint = parts.proxy.open(spec)
    progress = _Progress(parts.scaffold_name)
    outcome, reason = Outcome.SCORED, ""
    try:
        async with (preparations or Preparations(parts.backend)).of(attempt.task) as task:
            changes = await _work(task, (session, endpoint), parts, progress)
            if task.services is None:
                await _close(session, parts, progress)
                await _judge(task, changes, _trajectory(session), parts, progress)
            progress.enter("end")
    except Exception as error:  # noqa: BLE001 - the one boundary where a failure becomes data
        failure = session.failure or error
        on_failure(failure)
        outcome, reason = _blame(failure, progress.phase)
        progress.verdict = Verdict(None)
    finally:
        await parts.proxy.close(session)
    task = attempt.task
    return Rollout(
        rollout_id,
        task.id,
        task.domain,
        task.group,
        attempt.number,
        outcome,
        _trajectory(session),
        progress.verdict,
        progress.exit_reason,
        reason,
        progress.seconds,
        progress.scaffold,
        tuple(progress.egress.visits) if progress.egress else (),
    )


async def _work(
    task: Task, opened: tuple[Session, ModelEndpoint], parts: Parts, progress: _Progress
) -> bytes:
    session, endpoint = opened
    spec = replace(await _machine(task, parts, progress), serves=session.spec.session_id)
    async with parts.backend.open(spec) as sandbox:
        if not isinstance(sandbox, SupportsChanges):
            raise SandboxError(
                "this sandbox cannot say what was changed; it cannot be judged afresh"
            )
        await set_up(task, sandbox)
        reached: Sandbox = sandbox
        if spec.has_door:
            progress.egress = Egress(task.allowed_hosts) if task.egress == "allowlist" else None
            endpoint = await _through_the_door(sandbox, opened, parts.proxy, progress.egress)
        if progress.egress:
            reached = Reaching(sandbox, endpoint.inside_url)
        progress.canaries = await plant(sandbox, task.canaries)
        progress.enter("agent")
        try:
            agent = parts.scaffold.run(task.prompt, reached, endpoint)
            result = await _within(task.timeout_s, agent, session)
            progress.exit_reason = result.stderr.decode(errors="replace")[-_SHOWN:]
        except TimeoutError:
            progress.exit_reason = "time"
        if session.spent_s:
            progress.exit_reason = "budget"
        if not session.num_asked:
            raise ScaffoldError(f"it never asked the model for anything: {progress.exit_reason}")
        progress.enter("changes")
        if task.services is not None:
            await live.settle(task, sandbox)
        changes = await sandbox.changes()
        looking = asyncio.to_thread(progress.canaries.flags, _trajectory(session), changes)
        progress.flags = await looking
        if task.services is not None:
            await _close(session, parts, progress)
            await progress.canaries.remove(sandbox)
            judging = live.judge(task, sandbox, changes, _trajectory(session), parts.verifier)
            _say(task, await judging, progress)
        return changes


async def _close(session: Session, parts: Parts, progress: _Progress) -> None:
    """The model's part is over."""
    await parts.proxy.close(session)
    if session.failure:
        raise session.failure
    progress.enter("verify")


async def _machine(task: Task, parts: Parts, progress: _Progress) -> SandboxSpec:
    """The task's sandbox, with what the scaffold needs besides."""
    is_live = task.services is not None
    spec = replace(task.sandbox, has_door=task.egress == "allowlist", is_live=is_live)
    if not isinstance(parts.scaffold, RunsInside):
        return spec
    if task.egress == "none":
        raise ScaffoldError(
            f"{task.id} lets nothing out, and this scaffold reaches its model from inside;"
            " take one that runs beside the proxy, such as mini, or another egress"
        )
    needs = await parts.scaffold.install(_LOG.info)
    progress.scaffold = f"{progress.scaffold} {needs.version}".strip()
    return replace(
        spec,
        memory_mib=max(spec.memory_mib, needs.memory_mib),
        max_processes=max(spec.max_processes, needs.max_processes),
        disk_mib=max(spec.disk_mib, needs.disk_mib),
        tools=needs.tools,
        has_door=True,
    )


async def _through_the_door(
    sandbox: Sandbox,
    opened: tuple[Session, ModelEndpoint],
    proxy: Proxy,
    egress: Egress | None,
) -> ModelEndpoint:
    session, endpoint = opened
    if not isinstance(sandbox, SupportsDoor):
        raise SandboxError("there is something to reach from inside, and this sandbox has no door")
    door, url = sandbox.door()
    await proxy.listen(session, door, egress)
    return replace(endpoint, inside_url=url)


async def _within(
    limit_s: float, agent: Coroutine[Any, Any, ExecResult], session: Session
) -> ExecResult:
    """The agent's result, or TimeoutError once it has worked for `limit_s` seconds.

    While it waits for the model its clock stands still: a slow engine is not the policy's fault, and the
    session's own budget bounds the wait. One that goes on for long after its budget was spent, or after the
    engine failed, is stopped.
    """
    running = asyncio.ensure_future(agent)
    started_s = time.monotonic()
    try:
        while not running.done():
            now = time.monotonic()
            left_s = limit_s - (now - started_s - session.waited_s)
            if session.failure:
                raise session.failure
            if left_s <= 0 or (session.spent_s and now - session.spent_s > _GRACE_S):
                raise TimeoutError
            await asyncio.wait({running}, timeout=min(left_s, _POLL_S))
        return running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _judge(
    task: Task, changes: bytes, trajectory: Trajectory, parts: Parts, progress: _Progress
) -> None:
    spec = replace(task.sandbox, serves=trajectory.session_id)
    async with parts.backend.open(spec) as sandbox:
        await set_up(task, sandbox)
        if isinstance(sandbox, SupportsChanges):
            await sandbox.apply(changes)
        await progress.canaries.remove(sandbox)
        verdict = await parts.verifier.verify(task, sandbox, trajectory)
    _say(task, verdict, progress)


def _say(task: Task, verdict: Verdict, progress: _Progress) -> None:
    if verdict.reward is None:
        raise VerifierError(f"{task.id}: the verifier gave no reward: {verdict.reason}")
    progress.verdict = _flagged(verdict, progress.flags)


def _flagged(verdict: Verdict, flags: tuple[Flag, ...]) -> Verdict:
    """The verdict with flags besides its own. Any of them makes the reward 0."""
    flags = (*flags, *verdict.flags)
    if not flags or verdict.reward is None:
        return verdict
    metrics = {**verdict.metrics, "unflagged": verdict.reward}
    return replace(verdict, reward=0.0, metrics=metrics, flags=flags)


def _trajectory(session: Session) -> Trajectory:
    return build_trajectory(session.spec.session_id, session.calls)


def _blame(error: Exception, phase: str) -> tuple[Outcome, str]:
    reason = f"{phase}: {type(error).__name__}: {error}"
    for kind, outcome in _FAULTS:
        if isinstance(error, kind):
            is_judging = phase == "verify" and outcome is Outcome.SANDBOX_FAILED
            return (Outcome.VERIFIER_FAILED if is_judging else outcome), reason
    by_phase = {"agent": Outcome.SCAFFOLD_FAILED, "verify": Outcome.VERIFIER_FAILED}
    return by_phase.get(phase, Outcome.SANDBOX_FAILED), reason
