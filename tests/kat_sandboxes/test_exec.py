"""Commands, beyond the contract: the warm interpreter's life, images, and what is this backend's own."""

import asyncio
import time

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.errors import SandboxTimeoutError, TaskError
from katcore.protocols import Sandbox
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import bash, environment, output

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_what_is_no_text_is_no_command(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="surrogates"):
        await bash(sandbox, "echo \ud800")
    assert await output(sandbox, "echo on") == "on"


async def test_the_machine_s_own_programs_cannot_be_written(sandbox: Sandbox) -> None:
    with pytest.raises(OSError, match="Read-only"):
        await sandbox.write("/usr/bin/ls", b"")


async def test_at_the_time_limit_warm_python_dies_too(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxTimeoutError):
        await bash(sandbox, "python3 -c 'while True: pass'", timeout_s=0.5)
    running = await output(
        sandbox, "sleep 0.1; grep -Ls 'State:.Z' /proc/[0-9]*/status | xargs grep -hs Name || true"
    )
    assert running.count("python3") == 1, "pid 1 alone"


async def test_a_silent_client_of_pid_1_does_not_stop_the_clock(sandbox: Sandbox) -> None:
    before = time.monotonic()
    with pytest.raises(SandboxTimeoutError):
        await bash(sandbox, "exec 9<>/dev/tcp/127.0.0.1/7; sleep 60", timeout_s=0.5)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("said", ["nonsense\\0", "1\\0nonsense\\0", "99999\\0001\\0x\\0", "\\0\\0"])
async def test_nonsense_for_pid_1_does_not_end_the_sandbox(sandbox: Sandbox, said: str) -> None:
    await bash(sandbox, f"exec 9<>/dev/tcp/127.0.0.1/7; printf '{said}' >&9; sleep 0.1")
    assert await output(sandbox, "python3 -c 'print(1)'") == "1"


async def test_a_crowd_of_clients_of_pid_1_does_not_end_the_sandbox(sandbox: Sandbox) -> None:
    crowd = 'for n in {20..900}; do eval "exec $n<>/dev/tcp/127.0.0.1/7" || break; done; sleep 0.2'
    await bash(sandbox, f"({crowd}) & ({crowd}) & wait")
    assert await output(sandbox, "python3 -c 'print(1)'") == "1"


async def test_many_sandboxes_open_at_once(backend: LocalBackend, plain: SandboxSpec) -> None:
    async def one(number: int) -> str:
        async with backend.open(plain) as sandbox:
            await output(sandbox, f"echo {number} > mine")
            return await output(sandbox, "cat mine")

    numbers = [str(n) for n in range(60)]
    assert await asyncio.gather(*map(one, range(60))) == numbers


async def test_a_dockerfile_that_cannot_be_built_says_so(
    backend: LocalBackend, tmp_path: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = environment(tmp_path_factory.mktemp("bad"), "FROM host\nUSER me\n")
    with pytest.raises(TaskError, match="Dockerfile:2: USER is not supported"):
        async with backend.open(SandboxSpec(folder)):
            pass


async def test_run_builds_a_layer_once(
    backend: LocalBackend, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dockerfile = (
        "FROM host\nCOPY a /pkg/\nWORKDIR /pkg\nENV WORD=hi\nRUN echo $WORD > b \\\n && rm a\n"
    )
    folder = environment(tmp_path_factory.mktemp("run"), dockerfile, a="x")
    for _ in range(2):
        async with backend.open(SandboxSpec(folder)) as sandbox:
            assert await output(sandbox, "pwd; ls; cat b; echo $WORD") == "/pkg\nb\nhi\nhi"
            await output(sandbox, "echo spoilt > b")


async def test_a_run_that_fails_says_what_it_printed(
    backend: LocalBackend, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = environment(tmp_path_factory.mktemp("fails"), "FROM host\nRUN echo sorry; exit 3\n")
    with pytest.raises(Exception, match="exited with 3: sorry"):
        async with backend.open(SandboxSpec(folder)):
            pass
