"""Writes katcore/bench/recorded.json: what the calls of coding agents share, by running the agents.

Agents, sandboxes and proxy are real. The model's part is a script: it reads files, writes some, and now and
then has a sub-agent look around, if it is offered one. Of what is recorded the lengths stay. First:

    kat scaffolds install claude-code opencode openclaw
"""

import asyncio
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kat_scaffolds.recipe import AgentConfig, recipe
from katcore.bench.recorded import FILE, stretches
from katcore.cli.common import say
from katcore.dataset.harbor import Draft, read_task, write_task
from katcore.inference.bytes import byte_chat
from katcore.inference.scripted import ScriptedEngine, Turn
from katcore.pipeline.scaffold_script import AGENTS, call_of, shell
from katcore.plugin import Plugins
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.sandbox.lease import open_backend
from katcore.scaffold.command import CommandScaffold
from katcore.schema.call import EngineRequest, Sampling
from katcore.schema.sample import Sample
from katcore.schema.task import Task
from katcore.trajectory.formats import tree_sample

ROOT = Path(__file__).parents[1]
TASK = "Improve the error messages of this package."
INNER = "Find out how this part is tested, and report it."
NUM_FILES = 10


class Player(ScriptedEngine):
    """Works for so many turns, whatever becomes of its history on the way."""

    def __init__(self, num_turns: int) -> None:
        super().__init__(byte_chat(), ())
        self._num_turns = num_turns
        self._turn_number = 0
        self._choose = random.Random(0)

    def _turn(self, request: EngineRequest) -> Turn:
        if not request.tools:  # a summary of what was done
            return self._words(900)
        asked = "".join([m.content for m in request.messages if m.role == "user"][:2])
        if INNER in asked and TASK not in asked:
            return self._inner(
                sum(message.role == "assistant" for message in request.messages), request
            )
        number = self._turn_number
        self._turn_number += 1
        offered = next((tool for tool in request.tools if tool.name in AGENTS), None)
        if offered and number % 7 == 4:
            kind = AGENTS[offered.name]
            texts = {"prompt": INNER, "task": INNER, "description": "look around"}
            return call_of(offered, **texts, **({"subagent_type": kind} if kind else {}))
        if number == self._num_turns:
            return self._words(300)
        path = f"src/part_{number % NUM_FILES}.py"
        if number % 4 == 3:
            return shell(request, f"cat > {path} <<'END'\n{self._words(700)}\nEND\nls src")
        lines = self._choose.randrange(20, 90)
        return shell(request, f"sed -n '1,{lines}p' {path}; grep -rn part_{number} . | head")

    def _inner(self, number: int, request: EngineRequest) -> Turn:
        if number < 4:
            return shell(request, f"sed -n '1,{20 + 10 * number}p' src/part_{3 + number}.py")
        return self._words(500)

    def _words(self, num_chars: int) -> str:
        return "".join(self._choose.choices("etaoinshrdlucmfwypvbgk      ", k=num_chars)).strip()


def repository(folder: Path) -> Task:
    """Some of katcore's own modules to work on."""
    modules = sorted(
        ROOT.joinpath("katcore", "train").glob("*.py"), key=lambda path: path.stat().st_size
    )
    files = {f"src/part_{n}.py": path.read_bytes() for n, path in enumerate(modules[-NUM_FILES:])}
    copied = "".join(f"COPY {name} /repo/{name}\n" for name in files)
    start = "RUN git init -q . && git add -A && git commit -qm start\n"
    dockerfile = f"FROM host\nWORKDIR /repo\n{copied}{start}".encode()
    test = {"test.sh": b"echo 1 > /logs/verifier/reward.txt\n"}
    draft = Draft(
        "improve", "general", TASK, {"Dockerfile": dockerfile, **files}, test, (), timeout_s=600.0
    )
    return read_task(write_task(folder, "train", draft))


def agents() -> Iterator[tuple[str, CommandScaffold, int]]:
    """Scaffolds, and how many turns they work for."""
    yield "claude-code", CommandScaffold(recipe("claude-code", AgentConfig()), "claude-code"), 20
    # A window that makes it put its history into a summary.
    yield (
        "opencode",
        CommandScaffold(recipe("opencode", AgentConfig(context=60000)), "opencode"),
        20,
    )
    # Over Chat Completions its last message, of what it knows itself, moves along with each turn.
    claw = recipe("openclaw", AgentConfig())
    files = {
        name: text.replace("openai-responses", "openai-completions")
        for name, text in claw.files.items()
    }
    yield "openclaw", CommandScaffold(claw.model_copy(update={"files": files}), "openclaw"), 20


async def record(scaffold: CommandScaffold, num_turns: int) -> tuple[str, Sample]:
    """The agent's version, and the token tree of a rollout."""
    version = (await scaffold.install(say)).version
    plugins = Plugins.installed()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task = repository(folder / "tasks")
        verifier = plugins.make("verifier", "test-script", {})
        async with (
            open_backend(plugins, "local", work="record shapes") as backend,
            Proxy(folder / "calls.jsonl") as proxy,
        ):
            parts = Parts(
                proxy, backend, scaffold, verifier, Sampling(max_tokens=8192), Budget(), "shapes"
            )
            rollout = await run_rollout("shapes", Attempt(task, Player(num_turns)), parts)
    sample = tree_sample(rollout)
    if sample is None:
        raise SystemExit(f"{version}: {rollout.outcome}, {rollout.exit_reason or rollout.error}")
    return version, sample


async def main() -> None:
    """Run all, one after the other."""
    found = {}
    for name, scaffold, num_turns in agents():
        version, sample = await record(scaffold, num_turns)
        found[f"{name} {version}"] = stretches(sample.parents, sample.trained)
        leaves = len(set(range(len(sample.parents))) - set(sample.parents))
        say(f"{name} {version}: {len(sample.tokens)} bytes, {leaves} branches")
    rows = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(stretch)}" for name, stretch in found.items()
    )
    ROOT.joinpath("katcore", "bench", FILE).write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    asyncio.run(main())
