"""`kat scaffolds check`: a scaffold run for real against scripted answers, and what came of it.

The model's part is played by a programme (see `scaffold_script`). Everything else is what a rollout has:
sandbox, door, proxy, log, verifier.
"""

import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katcore.dataset.harbor import Draft, read_task, write_task
from katcore.inference.bytes import byte_chat
from katcore.inference.chat import ChatTokenizer
from katcore.pipeline.scaffold_script import AGENTS, MAX_CALLS, PROMPT, Player, Script, scenes
from katcore.plugin import Plugins
from katcore.protocols import RunsInside, Sandbox, Scaffold
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.sandbox.lease import open_backend
from katcore.schema.call import ModelCall, Sampling
from katcore.schema.rollout import ExecResult, Installation, ModelEndpoint, Outcome, Rollout, Turn
from katcore.schema.task import Task
from katcore.trajectory.audit import audit_samples
from katcore.trajectory.calls import calls_by_session
from katcore.trajectory.formats import TreeConfig, TreeFormatter
from katcore.trajectory.raw import restore

COLUMNS = (
    "streaming", "tool call", "multi-turn", "roles", "exact", "budget", "busy", "engine error", "exits",
    "nothing left",
)  # fmt: skip
_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the matrix. `ok` None: the scaffold has no such feature."""

    scaffold: str
    version: str
    column: str
    ok: bool | None
    why: str = ""


async def check(
    plugins: Plugins, name: str, options: dict[str, Any], report: Callable[[str], None]
) -> list[Cell]:
    """The row of one scaffold: runs it five times, each in a sandbox of its own."""
    scaffold = plugins.make("scaffold", name, options)
    version = ""
    if isinstance(scaffold, RunsInside):
        version = (await scaffold.install(report)).version
    async with _bench(plugins, scaffold) as bench:
        runs: dict[str, _Run] = {}
        for scene, (script, budget) in scenes().items():
            report(f"{name} {version}: {scene}")
            runs[scene] = await bench.run(scene, script, budget)
    cells = []
    for column in COLUMNS:
        ok, why = _JUDGES[column](runs)
        cells.append(Cell(name, version, column, ok, "" if ok else why))
    return cells


@dataclass(slots=True)
class _Run:
    rollout: Rollout
    calls: list[ModelCall]
    exit_code: int | None
    left: list[str]

    @property
    def roles(self) -> list[str]:
        return [turn.role for turn in self.rollout.trajectory.turns]

    @property
    def end(self) -> str:
        """How it ended, in words."""
        rollout = self.rollout
        return f"{rollout.outcome}, {rollout.exit_reason or rollout.error}"


class _Watched:
    """The scaffold, and a look at the sandbox when it has ended."""

    def __init__(self, scaffold: Scaffold) -> None:
        self._scaffold = scaffold
        self.exit_code: int | None = None
        self.left: list[str] = []

    async def install(self, report: Callable[[str], None]) -> Installation:
        if isinstance(self._scaffold, RunsInside):
            return await self._scaffold.install(report)
        return Installation("", None, 0, 0, 0)

    async def run(self, prompt: str, sandbox: Sandbox, endpoint: ModelEndpoint) -> ExecResult:
        result = await self._scaffold.run(prompt, sandbox, endpoint)
        self.exit_code = result.exit_code
        listing = 'for p in /proc/[0-9]*; do [ $p = /proc/1 ] || { tr "\\0" " " < $p/cmdline; echo; }; done'
        shown = await sandbox.exec(["bash", "-c", listing])
        lines = shown.stdout.decode(errors="replace").splitlines()
        self.left = [
            line for line in lines if line.strip() and "/proc/" not in line and "tr " not in line
        ]
        return result


@dataclass(slots=True)
class _Bench:
    plugins: Plugins
    scaffold: Scaffold
    backend: Any
    task: Task
    folder: Path
    chat: ChatTokenizer = field(default_factory=byte_chat)

    async def run(self, scene: str, script: Script, budget: Budget) -> _Run:
        log = self.folder / f"{scene.replace(' ', '-')}.jsonl"
        watched = _Watched(self.scaffold)
        verifier = self.plugins.make("verifier", "test-script", {})
        async with Proxy(log) as proxy:
            parts = Parts(
                proxy, self.backend, watched, verifier, Sampling(max_tokens=8192), budget, scene
            )
            has_tools = isinstance(self.scaffold, RunsInside)
            attempt = Attempt(self.task, Player(self.chat, script, has_tools=has_tools))
            rollout = await run_rollout(scene, attempt, parts)
        calls = calls_by_session(log).get(scene, [])
        return _Run(rollout, calls, watched.exit_code, watched.left)


@asynccontextmanager
async def _bench(plugins: Plugins, scaffold: Scaffold) -> AsyncIterator[_Bench]:
    with tempfile.TemporaryDirectory(prefix="katcore-check-") as temporary:
        folder = Path(temporary)
        async with open_backend(plugins, "local", work="scaffolds check") as backend:
            yield _Bench(plugins, scaffold, backend, _task(folder / "tasks"), folder)


def _task(root: Path) -> Task:
    dockerfile = (
        "FROM host\nWORKDIR /repo\nCOPY README.md /repo/README.md\n"
        "RUN git init -q . && git add -A && git commit -qm start\n"
    )
    test = '[ "$(cat /repo/hello.txt)" = hello ]; echo $((1 - $?)) > /logs/verifier/reward.txt\n'
    draft = Draft(
        "greet",
        "general",
        PROMPT,
        {"Dockerfile": dockerfile.encode(), "README.md": b"# A repository\n"},
        {"test.sh": test.encode()},
        (),
        timeout_s=_TIMEOUT_S,
    )
    return read_task(write_task(root, "train", draft))


_Judged = tuple[bool | None, str]


def _streaming(runs: dict[str, _Run]) -> _Judged:
    bodies = restore(runs["work"].calls).values()
    return (True, "") if any(body.get("stream") for body in bodies) else (None, "it never streams")


def _tool_call(runs: dict[str, _Run]) -> _Judged:
    run = runs["work"]
    return run.rollout.reward == 1.0, f"{run.end}; reward {run.rollout.reward}"


def _multi_turn(runs: dict[str, _Run]) -> _Judged:
    num = runs["work"].roles.count("main")
    return num == 3, f"{num} calls of the main conversation, not 3"


def _roles(runs: dict[str, _Run]) -> _Judged:
    work, inner = runs["work"].roles, runs["sub-agent"]
    if set(work) - {"main", "auxiliary"}:
        return False, f"without a sub-agent: {', '.join(work)}"
    tools = {tool.name for call in inner.calls for tool in call.tools or ()}
    if not tools & set(AGENTS):
        return True, "it offers no sub-agents"
    is_right = inner.roles.count("subagent") == 2 and inner.roles.count("main") >= 4
    return is_right, f"with a sub-agent: {', '.join(inner.roles)}"


def _exact(runs: dict[str, _Run]) -> _Judged:
    for scene in ("work", "sub-agent"):
        lost = _num_lost(runs[scene].rollout.trajectory.turns)
        if lost:
            return (
                False,
                f"{scene}: {lost} answers do not come back by the ids in which they were given",
            )
    rollout = runs["work"].rollout
    samples = list(TreeFormatter(TreeConfig()).samples([rollout]))
    audit = audit_samples(samples, {rollout.id: runs["work"].calls})
    return bool(samples) and not audit.problems, "; ".join(audit.problems) or "no sample"


def _num_lost(turns: Sequence[Turn]) -> int:
    """Answers of main and sub-agent that a later prompt of the same one lacks; each prompt counts anew."""
    conversations: list[str] = []
    said: dict[str, list[str]] = {"main": [], "subagent": []}
    lost = 0
    for turn in turns:
        before = conversations[turn.parent] if turn.parent >= 0 else ""
        prompt = before[: turn.num_shared] + _as_text(turn.prompt_ids)
        conversations.append(prompt + _as_text(turn.ids))
        answers = said.get(turn.role, [])
        lost += sum(answer not in prompt for answer in answers)
        answers.append(_as_text(turn.ids))
    return lost


def _as_text(ids: Sequence[int]) -> str:
    """Ids as characters, in which they can be looked for."""
    return "".join(map(chr, ids))


def _budget(runs: dict[str, _Run]) -> _Judged:
    run = runs["budget"]
    is_held = len(run.calls) == MAX_CALLS and run.rollout.exit_reason == "budget"
    return is_held and run.exit_code is not None, f"{len(run.calls)} calls; {run.end}"


def _busy(runs: dict[str, _Run]) -> _Judged:
    run = runs["busy"]
    return run.rollout.reward == 1.0, run.end


def _engine_error(runs: dict[str, _Run]) -> _Judged:
    run = runs["engine error"]
    return run.rollout.outcome is Outcome.ENGINE_FAILED and run.rollout.reward is None, run.end


def _exits(runs: dict[str, _Run]) -> _Judged:
    run = runs["work"]
    return run.exit_code == 0, run.end


def _nothing_left(runs: dict[str, _Run]) -> _Judged:
    left = [line for scene in ("work", "sub-agent") for line in runs[scene].left]
    return not left, "; ".join(left)[:200]


_JUDGES: dict[str, Callable[[dict[str, _Run]], _Judged]] = {
    "streaming": _streaming,
    "tool call": _tool_call,
    "multi-turn": _multi_turn,
    "roles": _roles,
    "exact": _exact,
    "budget": _budget,
    "busy": _busy,
    "engine error": _engine_error,
    "exits": _exits,
    "nothing left": _nothing_left,
}
