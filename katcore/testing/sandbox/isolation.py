"""Isolation: from the machine, from each other, from the network; and nothing that outlives a sandbox."""

import os
import socket
from pathlib import Path

import pytest

from katcore.errors import ImageMissingError, SandboxGoneError, TaskError
from katcore.protocols import Sandbox, SandboxBackend
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import (
    Declared,
    commands_of,
    environment,
    needs,
    output,
    processes_with,
    python,
    refused,
    wait_until,
)

_DIAL = "import socket; socket.create_connection(({!r}, {}), 3)"
_SERVE = (
    "import socket, time; s = socket.create_server(('127.0.0.1', 8000));"
    " print(flush=True); time.sleep(60)"
)


class Isolation(Declared):
    """What sandboxed code cannot see or do, and what is left of it."""

    async def test_the_machine_s_files_are_not_there(
        self, sandbox: Sandbox, tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_text("secret")
        await refused(sandbox, f"test -e {tmp_path}/secret")
        with pytest.raises(FileNotFoundError):
            await sandbox.read(f"{tmp_path}/secret")

    async def test_the_machine_s_processes_are_not_there(self, sandbox: Sandbox) -> None:
        assert "pytest" not in await commands_of(sandbox)
        inside = (await output(sandbox, "ls -d /proc/[0-9]*")).split()
        assert len(inside) < 12
        if f"/proc/{os.getpid()}" not in inside:
            await refused(sandbox, f"kill -0 {os.getpid()}")

    @pytest.mark.parametrize(
        "command",
        [
            "mount -t tmpfs none /tmp",
            "mount --bind /etc /tmp",
            "umount /proc",
            "unshare -m true",
            "unshare -Ur true",
            "chroot / true",
            "mknod /tmp/disk b 254 0",
            "date -s 2001-01-01",
            "echo 1 > /proc/sys/kernel/sysrq",
        ],
    )
    async def test_privileged_commands_are_refused(self, sandbox: Sandbox, command: str) -> None:
        await refused(sandbox, command)

    async def test_there_are_no_capabilities(self, sandbox: Sandbox) -> None:
        lines = (await output(sandbox, "cat /proc/self/status")).splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert int(status["CapEff"], 16) == 0
        assert int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"

    async def test_two_do_not_see_each_other(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async with backend.open(spec) as one, backend.open(spec) as two:
            await output(
                one, f"echo x > /tmp/mine; echo x > {self.workdir}/mine; echo x > /dev/shm/mine"
            )
            await output(
                one, f'python3 -c "{_SERVE}" >ready 2>&1 & while [ ! -s ready ]; do sleep 0.1; done'
            )
            assert (await python(one, _DIAL.format("127.0.0.1", 8000))).exit_code == 0
            for path in ("/tmp/mine", f"{self.workdir}/mine", "/dev/shm/mine"):
                await refused(two, f"test -e {path}")
            assert (await python(two, _DIAL.format("127.0.0.1", 8000))).exit_code != 0
            assert "8000" not in await commands_of(two)

    async def test_the_next_one_is_fresh(self, backend: SandboxBackend, spec: SandboxSpec) -> None:
        async with backend.open(spec) as sandbox:
            await output(
                sandbox, f"echo x > {self.workdir}/mine; echo x > /tmp/mine; echo x >> /etc/hosts"
            )
        async with backend.open(spec) as sandbox:
            assert (
                await output(sandbox, f"ls -A {self.workdir}; cat /tmp/mine 2>/dev/null; true")
                == ""
            )
            assert "x" not in (await output(sandbox, "cat /etc/hosts")).splitlines()

    async def test_there_is_no_way_out(self, sandbox: Sandbox) -> None:
        assert (await python(sandbox, _DIAL.format("192.0.2.1", 80))).exit_code != 0
        result = await python(sandbox, "import socket; print(socket.gethostbyname('example.com'))")
        assert result.exit_code != 0

    async def test_services_of_the_machine_are_out_of_reach(self, sandbox: Sandbox) -> None:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
            for host in {"127.0.0.1", *_own_addresses()}:
                assert (await python(sandbox, _DIAL.format(host, port))).exit_code != 0, host

    async def test_its_own_loopback_works(self, sandbox: Sandbox) -> None:
        source = (
            "import socket; s = socket.create_server(('127.0.0.1', 0));"
            " print(socket.create_connection(s.getsockname()).getpeername()[0])"
        )
        assert (await python(sandbox, source)).stdout == b"127.0.0.1\n"

    @needs("has_visible_processes")
    async def test_nothing_survives_it(self, backend: SandboxBackend, spec: SandboxSpec) -> None:
        async with backend.open(spec) as sandbox:
            await output(
                sandbox, "setsid sleep 72001 >/dev/null 2>&1 & nohup sleep 72001 >/dev/null 2>&1 &"
            )
            await wait_until(lambda: len(processes_with("72001")) >= 2)
        assert processes_with("72001") == []

    @needs("has_visible_processes")
    async def test_an_error_of_its_user_ends_it_too(
        self, backend: SandboxBackend, spec: SandboxSpec
    ) -> None:
        async def fail() -> None:
            async with backend.open(spec) as sandbox:
                await output(sandbox, "setsid sleep 72002 >/dev/null 2>&1 &")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        assert processes_with("72002") == []

    async def test_a_closed_one_is_gone(self, backend: SandboxBackend, spec: SandboxSpec) -> None:
        async with backend.open(spec) as sandbox:
            await output(sandbox, "true")
        for use in (sandbox.exec(["true"]), sandbox.read("/x"), sandbox.write("/tmp/x", b"")):
            with pytest.raises(SandboxGoneError):
                await use

    async def test_an_environment_that_cannot_be_built_says_so(
        self, backend: SandboxBackend, tmp_path: Path
    ) -> None:
        folder = environment(tmp_path / "bad", "FROM katcore-no-such-image\n")
        with pytest.raises((TaskError, ImageMissingError), match="katcore-no-such-image"):
            async with backend.open(SandboxSpec(folder)):
                pass


def _own_addresses() -> set[str]:
    """Where this machine's services can be reached besides."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except socket.gaierror:
        return set()
    return {str(item[4][0]) for item in found}
