"""Judging in the agent's own sandbox, for tasks that are about what runs: a service that has to answer.

What a fresh sandbox gives for nothing has to be had otherwise: all that the agent left running is ended but
the services that the task names; tests and reward are another user's; and programs and libraries that the
tests may use have to be those of the image.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace

from katcore.errors import SandboxError
from katcore.protocols import Sandbox, SupportsChanges, SupportsLive, Verifier
from katcore.schema.rollout import Flag, Trajectory, Verdict
from katcore.schema.task import Task

_GRACE_S = 1.0
"""How long what a service started for the tests may take to end."""
_PROGRAMS = re.compile(
    r"(usr/|usr/local/)?(s?bin|lib(exec|x?32|64)?)(/.*|$)|usr|usr/local|etc/ld[.-].*|opt/kat(/.*|$)"
)
_SHOWN = 5


async def settle(task: Task, sandbox: Sandbox) -> None:
    """End all that the agent left running, but the task's services.

    Raises:
        SandboxError: sandboxes of this backend cannot be judged while they run.
    """
    if not isinstance(sandbox, SupportsLive):
        raise SandboxError(f"{task.id} is judged in the agent's own sandbox, which this one cannot")
    await sandbox.settle(task.services or ())


async def judge(
    task: Task, sandbox: Sandbox, changes: bytes, trajectory: Trajectory, verifier: Verifier
) -> Verdict:
    """The verdict on a sandbox that has settled. Where `changes` touch programs, no test is run."""
    assert isinstance(sandbox, SupportsLive)
    assert isinstance(sandbox, SupportsChanges)
    if flags := tuple(_programs(changes)):
        return Verdict(0.0, "the tests were not run", flags=flags, is_live=True)
    async with sandbox.grader() as grader:
        verdict = await verifier.verify(task, grader, trajectory)
    left = await sandbox.settle(task.services or (), grace_s=_GRACE_S)
    survivors = [Flag("survivor", f"{', '.join(left)} ran beside the services")] if left else []
    flags = (*survivors, *_programs(await sandbox.changes()))
    return replace(verdict, flags=(*verdict.flags, *flags), is_live=True)


def _programs(changes: bytes) -> Iterator[Flag]:
    """Whether programs or libraries were changed, and which."""
    with tarfile.open(fileobj=io.BytesIO(changes)) as tar:
        found = [f"/{name}" for name in tar.getnames() if _PROGRAMS.fullmatch(name)]
    if found:
        shown = ", ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
        yield Flag("programs", f"of those that the tests may use: {shown}")
