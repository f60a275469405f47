"""Judging in the agent's own sandbox: what is run when, and what counts as a changed program."""

import io
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from katcore.errors import SandboxError
from katcore.protocols import Sandbox
from katcore.rollout import live
from katcore.schema.rollout import Flag, Trajectory, Verdict
from katcore.schema.task import SandboxSpec, Task
from tests.rollout.fakes import FakeSandbox

TASK = Task("t", "d", "p", Path(), SandboxSpec(Path()), services=("/work/service",))


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


class LiveSandbox(FakeSandbox):
    """`left` are what `settle` ends and `changed` what changes, each time that it is asked."""

    def __init__(self, left: Sequence[Sequence[str]], changed: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.left = [tuple(names) for names in left]
        self.changed = [archive(*names) for names in changed]
        self.done: list[str] = []

    async def settle(self, services: Sequence[str], *, grace_s: float = 0.0) -> tuple[str, ...]:
        assert tuple(services) == TASK.services
        self.done.append("settle")
        return self.left.pop(0)

    async def changes(self) -> bytes:
        return self.changed.pop(0)

    @asynccontextmanager
    async def grader(self) -> AsyncIterator[Sandbox]:
        self.done.append("grader")
        yield FakeSandbox()


class Passes:
    """A verifier."""

    async def verify(self, task: Task, sandbox: Sandbox, trajectory: Trajectory) -> Verdict:
        assert not isinstance(sandbox, LiveSandbox)
        return Verdict(1.0, "said")


async def judge(sandbox: LiveSandbox) -> Verdict:
    await live.settle(TASK, sandbox)
    changes = await sandbox.changes()
    return await live.judge(TASK, sandbox, changes, Trajectory("s", ()), Passes())


async def test_it_is_judged_as_the_grader_and_marked() -> None:
    sandbox = LiveSandbox([["/bin/sleep"], []], [["work", "work/a"], ["work", "work/b"]])
    assert await judge(sandbox) == Verdict(1.0, "said", is_live=True)
    assert sandbox.done == ["settle", "grader", "settle"]


async def test_what_runs_beside_the_services_afterwards_is_flagged() -> None:
    verdict = await judge(LiveSandbox([[], ["/bin/sleep"]], [[], []]))
    assert verdict.flags == (Flag("survivor", "/bin/sleep ran beside the services"),)


@pytest.mark.parametrize(
    ("name", "is_program"),
    [
        ("usr/bin/python3", True),
        ("bin/sh", True),
        ("usr/local/bin/new", True),
        ("usr/lib/python3/dist-packages/x.pth", True),
        ("lib64", True),
        ("usr/libexec/git-core/git", True),
        ("etc/ld.so.cache", True),
        ("etc/ld-musl-x86_64.path", True),
        ("opt/kat/lib/pytest.py", True),
        ("etc/nginx/nginx.conf", False),
        ("usr/share/doc/x", False),
        ("work/usr/bin/python3", False),
        ("srv/bin/server", False),
        ("binary", False),
    ],
)
async def test_with_other_programs_no_test_is_run(name: str, *, is_program: bool) -> None:
    before = LiveSandbox([[], []], [[name], []])
    verdict = await judge(before)
    assert [flag.kind for flag in verdict.flags] == ["programs"] * is_program
    assert ("grader" in before.done) == (not is_program)
    assert verdict.reward == (0.0 if is_program else 1.0)
    meanwhile = await judge(LiveSandbox([[], []], [[], [name]]))
    assert [flag.kind for flag in meanwhile.flags] == ["programs"] * is_program


async def test_where_no_sandbox_can_be_judged_live_it_says_so() -> None:
    with pytest.raises(SandboxError, match="in the agent's own sandbox"):
        await live.settle(TASK, FakeSandbox())
