"""`kat scaffolds check`: a scaffold run for real against scripted answers, and what came of it.

The model's part is played by a programme that calls whatever shell and sub-agent tools the scaffold offers.
Everything else is what a rollout has: sandbox, door, proxy, log, verifier.
"""

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from katcore.dataset.harbor import Draft, read_task, write_task
from katcore.errors import EngineBusyError, EngineError
from katcore.inference.bytes import byte_chat
from katcore.inference.chat import ChatTokenizer
from katcore.plugin import Plugins
from katcore.protocols import RunsInside, Sandbox, Scaffold
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.sandbox.lease import open_backend
from katcore.schema.call import (
    EngineRequest,
    Generation,
    Message,
    ModelCall,
    Sampling,
    Tool,
    ToolCall,
)
from katcore.schema.rollout import ExecResult, Installation, ModelEndpoint, Outcome, Rollout
from katcore.schema.task import Task
from katcore.trajectory.audit import audit_samples
from katcore.trajectory.calls import calls_by_session
from katcore.trajectory.formats import TreeConfig, TreeFormatter
from katcore.trajectory.raw import restore

COLUMNS = (
    "streaming", "tool call", "multi-turn", "roles", "exact", "budget", "busy", "engine error", "exits",
    "nothing left",
)  # fmt: skip
_SHELLS = ("Bash", "bash", "run_commands", "exec", "exec_command", "execute_command", "shell",
           "run_shell_command")  # fmt: skip
_AGENTS = {"Agent": "general-purpose", "Task": "general-purpose", "task": "general", "spawn_agent": "",
           "agent": "general-purpose"}  # fmt: skip
_TEXT_TOOL = Tool("bash", "", '{"properties": {"command": {"type": "string"}}}')
"""What a scaffold without tools takes as text."""
_SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
"""What mini-SWE-agent wants to see echoed; it takes no text for an end."""
_INNER = "Look around in this folder and report what is there."
_TITLE = "A greeting"
_TIMEOUT_S = 240.0
_MAX_CALLS = 5

Say = str | tuple[ToolCall, ...]
Script = Callable[[EngineRequest, int], Say]
"""What to answer to a request in whose conversation so many answers stand."""


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
        for scene, (script, budget) in _scenes().items():
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


class _Player:
    """The model: answers as the script says, in ids that its format renders."""

    def __init__(self, chat: ChatTokenizer, script: Script, *, has_tools: bool) -> None:
        self._chat = chat
        self._script = script
        self._has_tools = has_tools

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        return self._chat.encode(messages, tools=tools, start=start)

    async def generate(self, request: EngineRequest) -> Generation:
        number = sum(message.role == "assistant" for message in request.messages)
        asked = request if self._has_tools else replace(request, tools=(_TEXT_TOOL,))
        said = self._script(asked, number)
        text, calls = (said, ()) if isinstance(said, str) else ("", said)
        if not self._has_tools:
            text, calls = json.loads(calls[0].arguments)["command"] if calls else "submit", ()
        answer = Message("assistant", text, tool_calls=calls)
        ids = self._chat.answer_ids(answer, request.tools, request.messages)
        nothing = (0.0,) * len(ids)
        return Generation(ids, nothing, text, "stop", "scripted", "scripted", tool_calls=calls)


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
            attempt = Attempt(self.task, _Player(self.chat, script, has_tools=has_tools))
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
        "Write the word hello into a file named hello.txt, then show it.",
        {"Dockerfile": dockerfile.encode(), "README.md": b"# A repository\n"},
        {"test.sh": test.encode()},
        (),
        timeout_s=_TIMEOUT_S,
    )
    return read_task(write_task(root, "train", draft))


def _call(tool: Tool, **known: Any) -> tuple[ToolCall, ...]:
    """A call of a tool with what it requires; values it does not name are made up from its schema."""
    schema = json.loads(tool.parameters)
    arguments: dict[str, Any] = {}
    for name, about in schema.get("properties", {}).items():
        if name in known:
            arguments[name] = known[name]
        elif name in schema.get("required", ()):
            arguments[name] = _made_up(about)
    return (ToolCall("", tool.name, json.dumps(arguments)),)


def _made_up(about: dict[str, Any]) -> Any:
    if about.get("enum"):
        return about["enum"][0]
    simple = {"integer": 1, "number": 1, "boolean": False, "array": [], "object": {}}
    return simple.get(about.get("type", "string"), "a step")


def _shell(request: EngineRequest, command: str) -> Say:
    for name in _SHELLS:
        for tool in request.tools:
            if tool.name == name:
                return _call(tool, command=command, cmd=command, commands=[command])
    return _TITLE


def _work(request: EngineRequest, number: int) -> Say:
    steps = ["echo hello > hello.txt", "cat hello.txt"]
    if any(_SUBMIT in message.content for message in request.messages):
        steps.append(f"echo {_SUBMIT}")
    return _shell(request, steps[number]) if number < len(steps) else "Done."


def _delegate(request: EngineRequest, number: int) -> Say:
    """Main: start a sub-agent, then work. Sub-agent: look around, and report."""
    said = [message.content for message in request.messages if message.role == "user"]
    is_inner = any(_INNER in text for text in said[:2]) and "hello.txt" not in "".join(said[:2])
    if is_inner:
        return _shell(request, "ls") if number == 0 else "There is a README.md in this folder."
    offered = next((tool for tool in request.tools if tool.name in _AGENTS), None)
    if offered is None:
        return _work(request, number)
    if number == 0:
        kind = _AGENTS[offered.name]
        texts = {"prompt": _INNER, "task": _INNER, "description": "look around"}
        return _call(offered, **texts, **({"subagent_type": kind} if kind else {}))
    return _work(request, number - 1)


def _endless(request: EngineRequest, number: int) -> Say:
    return _shell(request, f"echo {number}")


class _Busy:
    """Too busy for the first request of the conversation with tools."""

    def __init__(self) -> None:
        self._is_over = False

    def __call__(self, request: EngineRequest, number: int) -> Say:
        if request.tools and not self._is_over:
            self._is_over = True
            raise EngineBusyError("the engine is busy", 1.0)
        return _work(request, number)


def _broken(request: EngineRequest, number: int) -> Say:
    if number:
        raise EngineError("the engine is gone")
    return _work(request, number)


_PLENTY = Budget(max_calls=60, max_tokens=1 << 20)


def _scenes() -> dict[str, tuple[Script, Budget]]:
    return {
        "work": (_work, _PLENTY),
        "sub-agent": (_delegate, _PLENTY),
        "budget": (_endless, Budget(max_calls=_MAX_CALLS, max_tokens=1 << 20)),
        "busy": (_Busy(), _PLENTY),
        "engine error": (_broken, _PLENTY),
    }


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
    if not tools & set(_AGENTS):
        return True, "it offers no sub-agents"
    is_right = inner.roles.count("subagent") == 2 and inner.roles.count("main") >= 4
    return is_right, f"with a sub-agent: {', '.join(inner.roles)}"


def _exact(runs: dict[str, _Run]) -> _Judged:
    calls = [call for scene in ("work", "sub-agent") for call in runs[scene].calls]
    inexact = sum(not call.is_exact for call in calls)
    if inexact:
        return False, f"{inexact} of {len(calls)} prompts hold answers that nobody gave"
    rollout = runs["work"].rollout
    samples = list(TreeFormatter(TreeConfig()).samples([rollout]))
    audit = audit_samples(samples, {rollout.id: runs["work"].calls})
    return bool(samples) and not audit.problems, "; ".join(audit.problems) or "no sample"


def _budget(runs: dict[str, _Run]) -> _Judged:
    run = runs["budget"]
    is_held = len(run.calls) == _MAX_CALLS and run.rollout.exit_reason == "budget"
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
