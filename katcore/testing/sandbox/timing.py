"""Time: limits that kill, commands that are given up, many at once, and the clock."""

import asyncio
import time

import pytest

from katcore.errors import SandboxTimeoutError
from katcore.protocols import Sandbox, SandboxBackend
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import Declared, commands_of, output, sh


class Timing(Declared):
    """When a command ends, and who is left then."""

    async def test_at_the_time_limit_a_command_ends(self, sandbox: Sandbox) -> None:
        started_s = time.monotonic()
        with pytest.raises(SandboxTimeoutError):
            await sh(sandbox, "sleep 300", timeout_s=0.5)
        assert 0.4 < time.monotonic() - started_s < 20

    async def test_at_the_time_limit_the_whole_tree_dies(self, sandbox: Sandbox) -> None:
        command = "setsid sleep 71001 & (trap '' TERM INT HUP; sleep 71001; sleep 71001) & wait"
        with pytest.raises(SandboxTimeoutError):
            await sh(sandbox, command, timeout_s=0.5)
        assert "71001" not in await commands_of(sandbox)

    async def test_at_the_time_limit_python_dies_too(self, sandbox: Sandbox) -> None:
        with pytest.raises(SandboxTimeoutError):
            await sandbox.exec(["python3", "-c", "while 71002: pass"], timeout_s=0.5)
        assert "71002" not in await commands_of(sandbox)

    async def test_after_the_time_limit_the_sandbox_goes_on(self, sandbox: Sandbox) -> None:
        await output(sandbox, "echo kept > file")
        with pytest.raises(SandboxTimeoutError):
            await sh(sandbox, "sleep 300", timeout_s=0.2)
        assert await output(sandbox, "cat file") == "kept"

    async def test_a_background_process_does_not_hold_up_the_answer(self, sandbox: Sandbox) -> None:
        started_s = time.monotonic()
        assert (await sh(sandbox, "sleep 60 & echo started")).stdout == b"started\n"
        assert time.monotonic() - started_s < 20

    async def test_a_cancelled_command_dies_with_all_it_started(self, sandbox: Sandbox) -> None:
        for wait_s in (0.0, 0.3):
            running = asyncio.create_task(sh(sandbox, "(sleep 71003 &); sleep 71003"))
            await asyncio.sleep(wait_s)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert "71003" not in await commands_of(sandbox)

    async def test_a_cancelled_command_s_answer_is_not_the_next_one_s(
        self, sandbox: Sandbox
    ) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await sh(sandbox, "sleep 1; echo late")
        assert await output(sandbox, "echo next") == "next"

    async def test_requests_made_at_once_are_answered_each(self, sandbox: Sandbox) -> None:
        answers = await asyncio.gather(*(output(sandbox, f"echo {n}") for n in range(20)))
        assert answers == [str(n) for n in range(20)]

    async def test_sandboxes_opened_at_once_are_each_their_own(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async def one(number: int) -> str:
            async with backend.open(spec) as sandbox:
                await output(sandbox, f"echo {number} > mine")
                return await output(sandbox, "cat mine")

        assert await asyncio.gather(*map(one, range(12))) == [str(n) for n in range(12)]

    async def test_the_clock_is_right_and_in_utc(self, sandbox: Sandbox) -> None:
        before_s = time.time()
        zone, said_s = (await output(sandbox, "date +'%z %s'")).split()
        assert before_s - 2 <= int(said_s) <= time.time() + 2
        assert zone == "+0000"
