"""What sandboxed code cannot see, do or use up. Every test here is an attempt that has to fail."""

import os
import shlex
import socket
import sys
from pathlib import Path

import psutil
import pytest

from kat_sandboxes.local import LocalBackend
from katcore.errors import SandboxTimeoutError
from katcore.protocols import Sandbox
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import bash, output, python

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
_CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
result = libc.syscall({})
print(result, ctypes.get_errno())
"""


async def refused(sandbox: Sandbox, command: str) -> None:
    result = await bash(sandbox, command)
    assert result.exit_code != 0, result.stdout.decode()


async def test_the_machine_s_files_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (secret, ROOT, Path(sys.prefix), Path("/etc/shadow"), Path("/sys"), Path("/boot")):
        assert path.exists() or path.name == "boot"
        await refused(sandbox, f"test -e {path}")
    shared = Path(sys.base_prefix)
    for path in Path.home().iterdir():
        if not shared.is_relative_to(path):
            await refused(sandbox, f"test -e {path}")


async def test_the_machine_s_processes_are_not_there(sandbox: Sandbox) -> None:
    seen = (await output(sandbox, "ls -d /proc/[0-9]*")).split()
    assert len(seen) < 6 < len(psutil.pids())
    assert "pytest" not in await output(sandbox, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    await refused(sandbox, f"kill -0 {os.getpid()}")


@pytest.mark.parametrize("name", ["root/", "cwd/", "fd/", "environ", "mem", "maps"])
async def test_pid_1_cannot_be_looked_into(sandbox: Sandbox, name: str) -> None:
    await refused(sandbox, f"ls /proc/1/{name} && head -c 1 /proc/1/{name}")


async def test_pid_1_cannot_be_killed_or_traced(sandbox: Sandbox) -> None:
    await bash(sandbox, "kill -9 1; kill -STOP 1; kill -TERM 1")
    assert await python(sandbox, _CALL.format("101, 16, 1, 0, 0")) == "-1 1"
    assert await output(sandbox, "echo on") == "on"


async def test_warm_python_does_not_lend_pid_1_s_files(sandbox: Sandbox) -> None:
    claim = "exec 9<>/dev/tcp/127.0.0.1/7; printf '1\\0002\\0-c\\0import os; print(os.listdir(\"/proc/self/fd\"))\\0' >&9; cat <&9"  # noqa: E501
    result = await bash(sandbox, claim)
    assert result.stdout.strip() in {b"1", b""}
    fds = await python(sandbox, "import os; print(len(os.listdir('/proc/self/fd')))")
    assert int(fds) < 12


@pytest.mark.parametrize(
    "command",
    [
        "mount -t tmpfs none /tmp",
        "mount --bind /etc /tmp",
        "umount /proc",
        "umount -l /usr",
        "mount -o remount,rw /usr",
        "unshare -m true",
        "unshare -U true",
        "unshare -Ur true",
        "unshare -n true",
        "unshare -p -f true",
        "chroot / true",
        "mknod /tmp/disk b 254 0",
        "mknod /tmp/null c 1 3",
        "nsenter -t 1 -m true",
        "hostname other",
        "date -s 2001-01-01",
        "echo 1 > /proc/sys/kernel/sysrq",
        "echo x > /usr/bin/new",
        "echo x > /opt/kat/new",
        "echo x > /dev/new",
        "echo -17 > /proc/1/oom_score_adj",
    ],
)
async def test_privileged_commands_are_refused(sandbox: Sandbox, command: str) -> None:
    await refused(sandbox, command)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
@pytest.mark.parametrize(
    "call",
    [
        "272, 0x10000000",  # unshare a user namespace
        "56, 0x10000011, 0, 0, 0, 0",  # clone into one
        "435, 0, 0",  # clone3
        "165, 0, 0, 0, 0, 0",  # mount
        "155, 0, 0",  # pivot_root
        "321, 0, 0, 0",  # bpf
        "298, 0, 0, 0, 0, 0",  # perf_event_open
        "323, 0",  # userfaultfd
        "250, 0, 0, 0, 0, 0",  # keyctl
        "310, 1, 0, 0, 0, 0, 0",  # process_vm_readv
        "246, 0, 0, 0, 0",  # kexec_load
        "175, 0, 0, 0",  # init_module
        "425, 1, 0",  # io_uring_setup
        "428, 0, 0, 0",  # open_tree
        "304, 0, 0, 0",  # open_by_handle_at
    ],
)
async def test_dangerous_calls_answer_with_an_error(sandbox: Sandbox, call: str) -> None:
    result, number = (await python(sandbox, _CALL.format(call))).split()
    assert result == "-1"
    assert number in {"1", "38"}


async def test_there_are_no_capabilities_to_have(sandbox: Sandbox) -> None:
    for command in (
        "cat /proc/self/status",
        "python3 -c 'print(open(\"/proc/self/status\").read())'",
    ):
        lines = (await output(sandbox, command)).splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"


async def test_there_is_no_network_but_its_own_loopback(sandbox: Sandbox) -> None:
    assert await python(sandbox, "import socket; print(socket.if_nameindex())") == "[(1, 'lo')]"
    dial = "import socket; socket.create_connection(('{}', {}), 2)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        await refused(sandbox, f"python3 -c {shlex.quote(dial.format(host, port))}")
    result = await bash(sandbox, f"python3 -c {shlex.quote(dial.format('192.0.2.1', 80))}")
    assert b"Network is unreachable" in result.stderr
    own = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(socket.create_connection(s.getsockname()).getpeername()[0])"  # noqa: E501
    assert await python(sandbox, own) == "127.0.0.1"


async def test_abstract_sockets_of_the_machine_are_out_of_reach(sandbox: Sandbox) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0katcore-test")
        server.listen()
        source = "import socket; socket.socket(socket.AF_UNIX).connect('\\0katcore-test')"
        await refused(sandbox, f"python3 -c {shlex.quote(source)}")


async def test_two_sandboxes_do_not_see_each_other(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    async with backend.open(plain) as one, backend.open(plain) as two:
        await output(one, "echo x > /tmp/mine; echo x > mine; echo x > /dev/shm/mine")
        serve = "python3 -c 'import socket,time; s=socket.create_server((\"127.0.0.1\",8000)); time.sleep(60)'"  # noqa: E501
        await output(one, f"{serve} >/dev/null 2>&1 & sleep 0.3; ipcmk -M 64 >/dev/null")
        for path in ("/tmp/mine", "/work/mine", "/dev/shm/mine"):
            await refused(two, f"test -e {path}")
        await refused(two, "exec 9<>/dev/tcp/127.0.0.1/8000")
        assert "0x" not in await output(two, "ipcs -m | tail -n +4")


async def test_links_do_not_lead_out(sandbox: Sandbox, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("the machine's")
    await output(sandbox, f"ln -s {target} out; ln -s ../../../../../..{target} up")
    for name in ("out", "up"):
        with pytest.raises(FileNotFoundError):
            await sandbox.read(f"/work/{name}")
        await sandbox.write(f"/work/folder/../{name}.txt", b"x")
    await output(sandbox, f"mkdir -p {tmp_path}")
    await sandbox.write("/work/out", b"the sandbox's")
    await sandbox.write(f"{target}", b"the sandbox's")
    assert target.read_text() == "the machine's"
    for path in (f"/proc/self/root{target}", f"/proc/1/root{target}", f"/../../..{target}"):
        assert await sandbox.read(path) == b"the sandbox's"


async def test_installed_packages_are_masked(sandbox: Sandbox) -> None:
    for name in ("torch", "numpy", "pydantic", "aiohttp", "katcore"):
        await refused(sandbox, f"python3 -c 'import {name}'")
        await refused(
            sandbox, f"$(python3 -c 'import sys; print(sys.executable)') -c 'import {name}'"
        )
    assert await python(sandbox, "import pytest; print(pytest.__name__)") == "pytest"


def _limits(plain: SandboxSpec, **limits: int) -> SandboxSpec:
    return SandboxSpec(plain.environment, **limits)


async def test_the_memory_limit_kills_and_the_sandbox_lives(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    async with backend.open(_limits(plain, memory_mib=96)) as sandbox:
        assert backend.limits != "none"
        result = await bash(sandbox, "python3 -c 'x = bytearray(300 << 20)'")
        assert result.exit_code == 137
        assert await python(sandbox, "print(len(bytearray(30 << 20)))") == str(30 << 20)


async def test_a_fork_bomb_stays_inside(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(_limits(plain, max_processes=40)) as sandbox:
        before = len(psutil.pids())
        with pytest.raises(SandboxTimeoutError):
            await bash(sandbox, "f() { f | f & sleep 60; }; f 2>/dev/null; wait", timeout_s=2)
        assert len(psutil.pids()) < before + 60
        assert await output(sandbox, "echo on") == "on"


async def test_processes_beyond_the_limit_do_not_start(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    async with backend.open(_limits(plain, max_processes=24)) as sandbox:
        source = """
import os, time
num = 0
try:
    while num < 100:
        if os.fork() == 0:
            time.sleep(60)
        num += 1
except BlockingIOError:
    pass
print(num)
"""
        assert 5 < int(await python(sandbox, source)) < 24


async def test_the_disk_limit_is_no_space_left(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(_limits(plain, disk_mib=8)) as sandbox:
        result = await bash(sandbox, "head -c 20000000 /dev/zero > big")
        assert result.exit_code != 0
        assert int(await output(sandbox, "stat -c %s big")) <= 8 << 20
        await output(sandbox, "rm big; echo x > small")


async def test_the_open_file_limit_holds(sandbox: Sandbox) -> None:
    assert await output(sandbox, "ulimit -Hn; ulimit -Hc") == "1024\n0"
    await refused(sandbox, "ulimit -n 4096")
