"""Being judged while it runs: what goes on and what ends, and what the agent's user and the grader may do."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from katcore.errors import SandboxError
from katcore.protocols import Sandbox, SandboxBackend, SupportsChanges, SupportsLive
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import Declared, needs, output

_WAITS = "setsid {} >/dev/null 2>&1 &"
_NAMES = "for p in /proc/[0-9]*; do readlink $p/exe; done"


class Live(Declared):
    """`settle` and `grader`, in a sandbox opened with `is_live`."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def live(self, backend: SandboxBackend, spec: SandboxSpec) -> AsyncIterator[SupportsLive]:
        """An open one."""
        async with backend.open(replace(spec, is_live=True)) as made:
            assert isinstance(made, SupportsLive)
            yield made

    async def test_whether_it_can_be_judged_live_is_declared(self, sandbox: Sandbox) -> None:
        assert isinstance(sandbox, SupportsLive) == self.has_live

    @needs("has_live")
    async def test_one_that_was_not_opened_live_has_no_grader(self, sandbox: Sandbox) -> None:
        assert isinstance(sandbox, SupportsLive)
        with pytest.raises(SandboxError, match="not opened"):
            async with sandbox.grader():
                pass

    @needs("has_live")
    async def test_services_go_on_and_all_else_ends(self, live: SupportsLive) -> None:
        agent = _sandbox(live)
        await output(agent, "cp $(command -v sleep) service; cp service other")
        for command in ("/work/service 1111", "/work/other 1112", "sh -c 'while :; do :; done'"):
            await output(agent, _WAITS.format(command))
        respawns = "sh -c 'while :; do /work/other 1113 & wait $!; done'"
        await output(agent, _WAITS.format(respawns))
        # All three are there: a shell that is about to be one of them is a process of another name.
        are_there = f"until [ $({_NAMES} | grep -c ^/work/) -ge 3 ]; do sleep 0.05; done"
        await output(agent, are_there)
        ended = await live.settle(["/work/service"])
        assert "/work/other" in ended
        assert "/work/service" not in ended
        running = await output(agent, f"{_NAMES}; true")
        assert "/work/service" in running
        assert "/work/other" not in running
        assert await live.settle(["/work/service"]) == ()

    @needs("has_live")
    async def test_a_name_makes_no_service(self, live: SupportsLive) -> None:
        agent = _sandbox(live)
        await output(agent, "cp $(command -v sleep) service; cp service other")
        named = "bash -c 'exec -a /work/service /work/other 1114'"
        is_named = (
            "until tr '\\0' ' ' < /proc/$!/cmdline | grep -q '^/work/service'; do sleep 0.05; done"
        )
        await output(agent, f"{_WAITS.format(named)} {is_named}")
        assert await live.settle(["/work/service"]) == ("/work/other",)

    @needs("has_live")
    async def test_what_ends_in_time_is_not_killed(self, live: SupportsLive) -> None:
        await output(_sandbox(live), _WAITS.format("sleep 0.3"))
        assert await live.settle([], grace_s=20) == ()

    @needs("has_live")
    async def test_the_grader_is_another_user_without_privileges(self, live: SupportsLive) -> None:
        async with live.grader() as grader:
            mine, its = await output(_sandbox(live), "id -u"), await output(grader, "id -u")
            assert mine != its
            status = await output(
                grader, "grep -E '^(Cap(Eff|Bnd)|NoNewPrivs|Seccomp):' /proc/self/status"
            )
            words = status.split()
            found = dict(zip(words[::2], words[1::2], strict=True))
            assert int(found["CapEff:"], 16) == 0
            assert (found["NoNewPrivs:"], found["Seccomp:"]) == ("1", "2")

    @needs("has_live")
    async def test_its_folders_are_its_own(self, live: SupportsLive) -> None:
        agent = _sandbox(live)
        await output(agent, "! ls /tests; ! ls /logs; ! touch /tests/x /logs/x")
        await output(
            agent, "! rmdir /tests; ! mv /logs /l; ! chmod 777 /tests; ! ln -sfT /work /tests"
        )
        async with live.grader() as grader:
            await grader.write("/tests/deep/test.sh", b"echo secret")
            assert await output(
                grader, "bash /tests/deep/test.sh; echo 1 > /logs/1; cat /logs/1"
            ) == ("secret\n1")
            await output(agent, "! cat /tests/deep/test.sh; ! cat /logs/1; ! echo 2 > /logs/1")
            for do in (agent.read("/logs/1"), agent.write("/logs/1", b"2")):
                with pytest.raises(PermissionError):
                    await do
            assert await grader.read("/logs/1") == b"1\n"

    @needs("has_live")
    async def test_it_cannot_be_signalled_or_looked_into(self, live: SupportsLive) -> None:
        agent = _sandbox(live)
        async with live.grader() as grader:
            await output(grader, _WAITS.format("sleep 1115"))
            look = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo $p; done | grep '^sleep 1115'"
            found = await output(agent, f"until {look}; do sleep 0.05; done")
            process = found.split()[-1].rpartition("/")[2]
            await output(
                agent,
                f"! kill -9 {process}; ! cat /proc/{process}/environ; ! ls /proc/{process}/fd",
            )
            await output(agent, f"! ls /proc/{process}/root/tests; kill -9 -1; true")
            assert await output(grader, f"kill -0 {process}; echo $?") == "0"

    @needs("has_live")
    async def test_it_finds_nothing_by_the_agent_s_variables(self, live: SupportsLive) -> None:
        await output(
            _sandbox(live), "mkdir -p ~/bin; cp $(command -v sleep) ~/bin/ls; cp ~/bin/ls ."
        )
        async with live.grader() as grader:
            found = await output(grader, "command -v ls; echo $HOME:$TMPDIR:$LD_PRELOAD:$BASH_ENV")
            path, rest = found.split()
            assert path.startswith(("/bin/", "/usr/"))
            assert rest == "/tests:/logs::"

    @needs("has_live", "has_changes")
    async def test_what_is_the_grader_s_is_no_change(self, live: SupportsLive) -> None:
        agent = _sandbox(live)
        await output(agent, "echo x > mine")
        async with live.grader() as grader:
            await grader.write("/tests/test.sh", b"of the grader")
        assert isinstance(agent, SupportsChanges)
        changes = await agent.changes()
        assert b"work/mine" in changes
        assert b"of the grader" not in changes


def _sandbox(live: SupportsLive) -> Sandbox:
    """The same with its other methods."""
    sandbox: Sandbox = live  # type: ignore[assignment]
    return sandbox
