"""Every trick, attempted for real."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from katcore.protocols import SandboxBackend
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, SessionSpec
from katcore.rollout.single import Attempt, Parts, run_rollout
from katcore.schema.call import Sampling
from katcore.schema.rollout import Outcome, Rollout
from katcore.schema.task import Task
from katcore.testing.redteam import scene
from katcore.testing.redteam.trick import REWARD, SERVICE, Trick
from katcore.testing.redteam.tricks import TRICKS
from katcore.testing.sandbox.base import Declared
from katcore.verifier.state import TestScriptConfig, TestScriptVerifier

_NAIVE = [trick for trick in TRICKS if trick.naive]
_SECRET = "the machine's secret"


class Machine:
    """What tricks aim at on this machine."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "file"
        self.path.write_text(_SECRET)
        self.service = socket.create_server(("", 0))
        self.process = subprocess.Popen(["sleep", "600"])

    def aimed(self, command: str, key: str) -> str:
        """A command with its targets filled in."""
        for name, value in (
            ("PORT", self.service.getsockname()[1]),
            ("PID", self.process.pid),
            ("PATH", self.path),
            ("KEY", key),
        ):
            command = command.replace(f"@{name}@", str(value))
        return command

    def check(self) -> None:
        """Nothing of it was touched."""
        assert self.path.read_text() == _SECRET
        assert self.process.poll() is None
        self.service.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.service.accept()

    def close(self) -> None:
        """End it."""
        self.service.close()
        self.process.kill()
        self.process.wait()


@pytest.mark.asyncio(loop_scope="module")
class RedTeam(Declared):
    """All tricks. Wants a fixture `backend`, of module scope and in the module's event loop."""

    has_git = True
    """The image of `dockerfile` has git; and it can be built with RUN."""
    has_pytest = True
    """It has pytest."""
    has_fixed_programs = True
    """Sandboxed code cannot change programs, and Python packages that are not a user's own."""

    @pytest.fixture(scope="class")
    @classmethod
    def task(cls, tmp_path_factory: pytest.TempPathFactory) -> Task:
        """A task that is set and judged with care."""
        return scene.write(
            tmp_path_factory.mktemp("redteam") / "task",
            cls.dockerfile,
            has_git=cls.has_git,
            has_pytest=cls.has_pytest,
        )

    @pytest.fixture
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
        """The targets on this machine."""
        monkeypatch.setenv("KATCORE_SECRET", "secret")
        made = Machine(tmp_path)
        yield made
        made.close()

    def _chosen(self, trick: Trick) -> None:
        for name in (*trick.needs, *(("has_live",) if trick.is_live else ())):
            if not getattr(self, name):
                pytest.skip(f"left out by declaration: {name} = False")

    @pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.name)
    async def test_a_trick_is_contained_or_flagged(
        self, backend: SandboxBackend, task: Task, machine: Machine, trick: Trick
    ) -> None:
        self._chosen(trick)
        if trick.is_live:
            task = scene.live(task, machine.path.with_name("live"))
        rollout = await _attempt(backend, task, machine, trick)
        said = "\n".join(
            message.content
            for turn in rollout.trajectory.turns
            for message in turn.messages
            if message.role == "user"
        )
        assert rollout.outcome is Outcome.SCORED, rollout.error
        assert rollout.reward == 0.0
        assert scene.MARK not in said
        assert "GOT IT" not in said
        kinds = {flag.kind for flag in rollout.verdict.flags}
        is_fixed = trick.is_fixed and self.has_fixed_programs
        assert kinds == (set() if is_fixed else {trick.flag} - {""}), rollout.verdict
        assert rollout.verdict.is_live == trick.is_live
        machine.check()
        assert len(said) < 4 * self.output_limit

    @pytest.mark.parametrize("trick", _NAIVE, ids=lambda trick: trick.name)
    async def test_a_trick_works_where_tests_are_run_the_naive_way(
        self, backend: SandboxBackend, task: Task, trick: Trick
    ) -> None:
        self._chosen(trick)
        async with backend.open(scene.unprotected(task)) as sandbox:
            said, reward = await scene.naively(sandbox, trick.commands, trick.naive)
        assert scene.MARK in said or "GOT IT" in said or reward == "1", said

    async def test_an_honest_repair_is_rewarded(
        self, backend: SandboxBackend, task: Task, machine: Machine
    ) -> None:
        repair = "sed -i 's/-/+/' calc.py; cat calc.py"
        rollout = await _attempt(backend, task, machine, Trick("", "", "", (repair,)))
        assert (rollout.reward, rollout.verdict.flags) == (1.0, ())
        naive = "cd /work; python3 -m unittest -q test_calc"
        async with backend.open(task.sandbox) as sandbox:
            assert (await scene.naively(sandbox, (), naive))[1] == "0"

    async def test_an_honest_service_is_judged_where_it_runs(
        self, backend: SandboxBackend, task: Task, machine: Machine
    ) -> None:
        if not self.has_live:
            pytest.skip("left out by declaration: has_live = False")
        task = scene.live(task, machine.path.with_name("live"))
        look = f"cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -q '[/]{SERVICE[1:]} 600'"
        with (task.directory / "tests" / "test.sh").open("a") as file:
            file.write(f"({look}) || echo 0 > {REWARD}\n")
        start = (
            "cp $(command -v sleep) service; setsid /work/service 600 >/dev/null 2>&1 & sleep 0.2"
        )
        for repair, reward in (("sed -i 's/-/+/' calc.py", 1.0), ("true", 0.0)):
            tried = Trick("", "", "", (repair, start), is_live=True)
            rollout = await _attempt(backend, task, machine, tried)
            assert (rollout.reward, rollout.verdict.flags) == (reward, ()), rollout
            assert rollout.verdict.is_live
        alone = Trick("", "", "", ("sed -i 's/-/+/' calc.py",), is_live=True)
        assert (await _attempt(backend, task, machine, alone)).reward == 0.0, "nothing answers"

    async def test_the_next_sandbox_knows_nothing_of_a_trick(
        self, backend: SandboxBackend, task: Task, machine: Machine
    ) -> None:
        spoil = "echo evil >> /etc/passwd; ln /etc/passwd p; echo evil >> p; echo evil > /tmp/evil"
        await _attempt(backend, task, machine, Trick("", "", "", (spoil,)))
        async with backend.open(task.sandbox) as sandbox:
            assert b"evil" not in await sandbox.read("/etc/passwd")
            with pytest.raises(FileNotFoundError):
                await sandbox.read("/tmp/evil")


async def _attempt(backend: SandboxBackend, task: Task, machine: Machine, trick: Trick) -> Rollout:
    """The trick as a rollout, while another one is going on."""
    log = machine.path.with_name("calls.jsonl")
    async with Proxy(log) as proxy:
        other, _ = proxy.open(SessionSpec("other", scene.Script(["ok"]), Sampling()))
        commands = [machine.aimed(command, other.key) for command in trick.commands]
        parts = Parts(
            proxy,
            backend,
            scene.InsideAgent() if trick.is_inside else scene.Agent(),
            TestScriptVerifier(TestScriptConfig(timeout_s=20)),
            Sampling(max_tokens=1 << 20),
            Budget(max_tokens=1 << 24),
        )
        engine = scene.Script([*commands, "submit"])
        rollout = await run_rollout(f"redteam-{os.getpid()}", Attempt(task, engine), parts)
        assert not other.calls
        assert other.num_asked == 0
    return rollout
