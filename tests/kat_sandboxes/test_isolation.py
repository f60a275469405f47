"""What sandboxed code cannot see or do, beyond the contract. Every test is an attempt that has to fail."""

import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from kat_sandboxes.local import LocalBackend
from kat_sandboxes.zygote import sandbox as inside
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
        "umount -l /usr",
        "mount -o remount,rw /usr",
        "unshare -U true",
        "unshare -n true",
        "unshare -p -f true",
        "mknod /tmp/null c 1 3",
        "nsenter -t 1 -m true",
        "hostname other",
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
        "447, 0",  # memfd_secret
        "308, 0, 0",  # setns
        "161, b'/'",  # chroot
        "117, 1, 1, 1",  # setresuid: there is no other user
        "300, 0, 0",  # fanotify_init
        "311, 1, 0, 0, 0, 0, 0",  # process_vm_writev
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
    dial = "import socket; socket.create_connection(('192.0.2.1', 80), 2)"
    result = await bash(sandbox, f"python3 -c {shlex.quote(dial)}")
    assert b"Network is unreachable" in result.stderr


async def test_shared_memory_of_others_is_out_of_reach(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    async with backend.open(plain) as one, backend.open(plain) as two:
        await output(one, "ipcmk -M 64 >/dev/null")
        assert "0x" in await output(one, "ipcs -m | tail -n +4")
        assert "0x" not in await output(two, "ipcs -m | tail -n +4")


async def test_sockets_that_no_network_namespace_holds_are_refused(sandbox: Sandbox) -> None:
    source = (
        "import errno, socket\n"
        "for family in range(1, 46):\n"
        "    try: print(socket.socket(family, socket.SOCK_STREAM).family.name)\n"
        "    except OSError as error: assert family != 40 or error.errno == errno.EAFNOSUPPORT\n"
    )
    assert await python(sandbox, source) == "AF_UNIX\nAF_INET\nAF_INET6"
    assert await python(sandbox, "import socket; print(socket.socket(16, 3).family.name)")


async def test_what_proc_says_of_the_machine_is_masked(sandbox: Sandbox) -> None:
    names = [name for name in inside._MASKED if name in os.listdir("/proc")]
    assert names
    assert await output(sandbox, f"cd /proc; head -qc 10 {' '.join(names)}") == ""


async def test_nothing_of_the_kernel_s_settings_can_be_written(sandbox: Sandbox) -> None:
    await refused(sandbox, "find /proc/sys /proc/sysrq-trigger -writable -type f | grep .")
    for path in ("/proc/self/mem", "/proc/self/oom_score_adj", "/proc/self/uid_map"):
        await refused(sandbox, f"exec 9<>{path}")


async def test_abstract_sockets_of_the_machine_are_out_of_reach(sandbox: Sandbox) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0katcore-test")
        server.listen()
        source = "import socket; socket.socket(socket.AF_UNIX).connect('\\0katcore-test')"
        await refused(sandbox, f"python3 -c {shlex.quote(source)}")


async def test_installed_packages_are_masked(sandbox: Sandbox) -> None:
    for name in ("torch", "numpy", "pydantic", "aiohttp", "katcore"):
        await refused(sandbox, f"python3 -c 'import {name}'")
        await refused(
            sandbox, f"$(python3 -c 'import sys; print(sys.executable)') -c 'import {name}'"
        )
    assert await python(sandbox, "import pytest; print(pytest.__name__)") == "pytest"


async def test_the_open_file_limit_holds(sandbox: Sandbox) -> None:
    assert await output(sandbox, "ulimit -Hn; ulimit -Hc") == "1024\n0"
    await refused(sandbox, "ulimit -n 4096")
