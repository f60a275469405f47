"""Commands: exit codes, exact bytes, limits, and nothing left behind."""

import asyncio
import time

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.errors import SandboxGoneError, SandboxTimeoutError, TaskError
from katcore.protocols import Sandbox, SupportsChanges
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import bash, environment, output, processes_with, wait_until

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
async def test_the_exit_code_is_the_command_s(sandbox: Sandbox, code: int) -> None:
    assert (await bash(sandbox, f"exit {code}")).exit_code == code


async def test_death_by_a_signal_is_128_and_its_number(sandbox: Sandbox) -> None:
    assert (await bash(sandbox, "kill -TERM $$")).exit_code == 128 + 15


async def test_a_program_that_is_not_there_is_a_result(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["no-such-program"])
    assert result.exit_code == 127
    assert b"no-such-program" in result.stderr


async def test_output_is_exact_bytes_of_each_stream(sandbox: Sandbox) -> None:
    result = await bash(sandbox, r"printf '\0\377\r\n\n'; printf 'no line end' >&2")
    assert result.stdout == b"\0\xff\r\n\n"
    assert result.stderr == b"no line end"
    assert not result.truncated


async def test_arguments_reach_the_program_as_they_are(sandbox: Sandbox) -> None:
    words = ["", "a b", "$HOME", "'\"", "\n", "日本", "*"]
    result = await sandbox.exec(["printf", r"%s\1", *words])
    assert result.stdout.split(b"\1")[:-1] == [word.encode() for word in words]


async def test_a_null_byte_is_no_command_and_harms_nothing(sandbox: Sandbox) -> None:
    with pytest.raises(ValueError, match="null"):
        await bash(sandbox, "echo a\0b")
    with pytest.raises(ValueError, match="surrogates"):
        await bash(sandbox, "echo \ud800")
    with pytest.raises(ValueError, match="null"):
        await sandbox.read("/a\0b")
    assert await output(sandbox, "echo on") == "on"


async def test_the_working_folder_is_workdir_unless_said(sandbox: Sandbox) -> None:
    assert await output(sandbox, "pwd") == "/work"
    assert (await sandbox.exec(["pwd"], cwd="/etc")).stdout == b"/etc\n"


async def test_variables_are_the_sandbox_s_own_and_what_is_given(sandbox: Sandbox) -> None:
    result = await sandbox.exec(["env"], env={"WORD": "a=b c"})
    variables = dict(line.split("=", 1) for line in result.stdout.decode().splitlines())
    assert variables["WORD"] == "a=b c"
    assert variables["HOME"] == "/root"
    assert not {name for name in variables if name.startswith(("PYTEST", "KATCORE", "VIRTUAL"))}


async def test_standard_input_is_empty(sandbox: Sandbox) -> None:
    assert await output(sandbox, "cat; echo end") == "end"


async def test_output_beyond_the_limit_is_dropped_and_said(sandbox: Sandbox) -> None:
    result = await bash(sandbox, "head -c 3000000 /dev/zero; echo -n err >&2")
    assert len(result.stdout) == 1 << 20
    assert result.truncated
    assert result.stderr == b"err"


async def test_at_the_time_limit_the_whole_tree_dies(sandbox: Sandbox) -> None:
    before = time.monotonic()
    with pytest.raises(SandboxTimeoutError):
        await bash(sandbox, "setsid sleep 70001 & (trap '' TERM; sleep 70001)", timeout_s=0.5)
    assert time.monotonic() - before < 5
    await wait_until(lambda: not processes_with("70001"))
    assert await output(sandbox, "echo on") == "on"


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


async def test_a_background_process_does_not_hold_up_the_answer(sandbox: Sandbox) -> None:
    result = await bash(sandbox, "sleep 60 & echo started")
    assert result.stdout == b"started\n"


async def test_a_cancelled_command_s_answer_is_not_taken_for_the_next_one_s(
    sandbox: Sandbox,
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await bash(sandbox, "sleep 1; echo late; echo x > kept")
    assert await output(sandbox, "echo next") == "next"
    await asyncio.sleep(1)
    assert isinstance(sandbox, SupportsChanges)
    assert b"kept" not in await sandbox.changes()


async def test_requests_made_at_once_are_answered_each(sandbox: Sandbox) -> None:
    answers = await asyncio.gather(*(output(sandbox, f"echo {n}") for n in range(20)))
    assert answers == [str(n) for n in range(20)]


async def test_files_are_read_and_written_exactly(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 9000
    await sandbox.write("/new/folder/file", data)
    assert await sandbox.read("/new/folder/file") == data
    await sandbox.write("/new/folder/file", b"")
    assert await sandbox.read("/new/folder/file") == b""


async def test_reading_says_what_is_wrong(sandbox: Sandbox) -> None:
    with pytest.raises(FileNotFoundError):
        await sandbox.read("/none")
    with pytest.raises(IsADirectoryError):
        await sandbox.read("/etc")
    with pytest.raises(OSError, match="Read-only"):
        await sandbox.write("/usr/bin/ls", b"")


async def test_reading_a_pipe_nobody_writes_to_does_not_hang(sandbox: Sandbox) -> None:
    await output(sandbox, "mkfifo pipe")
    async with asyncio.timeout(5):
        with pytest.raises(OSError, match="not a regular file"):
            await sandbox.read("/work/pipe")
    assert await output(sandbox, "echo on") == "on"


async def test_nothing_survives_the_sandbox(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(plain) as sandbox:
        await output(
            sandbox, "setsid sleep 70002 >/dev/null 2>&1 & nohup sleep 70002 &>/dev/null &"
        )
        await wait_until(lambda: len(processes_with("70002")) == 2)
    assert not processes_with("70002")


async def test_a_closed_sandbox_is_gone(backend: LocalBackend, plain: SandboxSpec) -> None:
    async with backend.open(plain) as sandbox:
        await output(sandbox, "true")
    with pytest.raises(SandboxGoneError):
        await sandbox.exec(["true"])


async def test_an_error_inside_the_context_destroys_the_sandbox(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    with pytest.raises(RuntimeError):  # noqa: PT012
        async with backend.open(plain) as sandbox:
            await output(sandbox, "setsid sleep 70003 >/dev/null 2>&1 &")
            raise RuntimeError
    assert not processes_with("70003")


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


async def test_a_cancelled_command_is_killed_with_all_that_it_started(sandbox: Sandbox) -> None:
    command = "(sleep 300 &) ; sleep 300"
    started = time.monotonic()
    for wait_s in (0.0, 0.3):
        running = asyncio.create_task(sandbox.exec(["bash", "-c", command], timeout_s=200))
        await asyncio.sleep(wait_s)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        listed = await sandbox.exec(["bash", "-c", "cat /proc/[0-9]*/comm"])
        assert b"sleep" not in listed.stdout
    assert time.monotonic() - started < 30
