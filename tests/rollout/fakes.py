"""A sandbox that is a dictionary, and parts that fail when told to."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from katcore.protocols import Sandbox, Scaffold, Verifier
from katcore.schema.rollout import ExecResult, ModelEndpoint, Trajectory, Verdict
from katcore.schema.task import SandboxSpec, Task


class FakeSandbox:
    """Knows `put NAME TEXT`, `get NAME`, `sleep S`, `true`; `fails` are raised by the method of that name."""

    def __init__(self, fails: Mapping[str, Exception] | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.fails = fails or {}
        self.commands: list[list[str]] = []

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> ExecResult:
        self.commands.append(list(argv))
        self._fail("exec")
        words = argv[-1].split()
        if words[:1] == ["put"]:
            self.files[words[1]] = " ".join(words[2:]).encode()
            return ExecResult(0, b"", b"")
        if argv[:2] == ["sh", "-c"] and len(argv) > 3:  # canaries are removed
            self.files = {name: data for name, data in self.files.items() if name not in argv}
            return ExecResult(0, b"", b"")
        if words[:1] == ["sleep"]:
            await asyncio.sleep(float(words[1]))
            return ExecResult(0, b"", b"")
        if words == ["true"]:
            return ExecResult(0, b"", b"")
        if words[:1] == ["get"] and words[1] in self.files:
            return ExecResult(0, self.files[words[1]], b"")
        return ExecResult(1, b"", f"no {argv[-1]}".encode())

    async def read(self, path: str) -> bytes:
        self._fail("read")
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    async def write(self, path: str, data: bytes) -> None:
        self._fail("write")
        self.files[path] = data

    async def changes(self) -> bytes:
        self._fail("changes")
        return pickle.dumps(self.files)

    async def apply(self, changes: bytes) -> None:
        self._fail("apply")
        self.files |= pickle.loads(changes)

    def _fail(self, method: str) -> None:
        if method in self.fails:
            raise self.fails[method]


class FakeBackend:
    """Opens fake sandboxes. `fails[n]` is what the n-th fails with: by method name, or "open"."""

    def __init__(self, *fails: Mapping[str, Exception]) -> None:
        self.fails = list(fails)
        self.num_open = 0
        self.max_open = 0
        self.opened: list[FakeSandbox] = []

    @asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        fails = self.fails.pop(0) if self.fails else {}
        if "open" in fails:
            raise fails["open"]
        sandbox = FakeSandbox(fails)
        self.opened.append(sandbox)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            yield sandbox
        finally:
            self.num_open -= 1

    async def close(self) -> None:
        """Nothing to stop."""


class FailingScaffold:
    """Does a scaffold's work, then raises."""

    def __init__(self, scaffold: Scaffold, error: Exception) -> None:
        self.scaffold = scaffold
        self.error = error

    async def run(self, prompt: str, sandbox: Sandbox, endpoint: ModelEndpoint) -> ExecResult:
        await self.scaffold.run(prompt, sandbox, endpoint)
        raise self.error


class FileVerifier:
    """The reward is 1 if `answer` is "right"; or what it is given, or raises it."""

    def __init__(self, result: Verdict | Exception | None = None) -> None:
        self.result = result
        self.seen: list[tuple[Sandbox, Trajectory]] = []

    async def verify(self, task: Task, sandbox: Sandbox, trajectory: Trajectory) -> Verdict:
        self.seen.append((sandbox, trajectory))
        if isinstance(self.result, Exception):
            raise self.result
        if self.result:
            return self.result
        try:
            is_right = await sandbox.read("answer") == b"right"
        except FileNotFoundError:
            is_right = False
        return Verdict(float(is_right), "looked")


def a_task(number: int = 0, *, timeout_s: float = 10.0) -> Task:
    directory = Path("/nowhere")
    return Task(
        f"t{number}", "d", "do it", directory, SandboxSpec(directory), "g", timeout_s=timeout_s
    )


_: Verifier = FileVerifier()
