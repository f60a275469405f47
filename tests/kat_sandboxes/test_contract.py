"""The local backend does what every backend has to; and a fault of a backend is found by the contract."""

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.errors import SandboxTimeoutError
from katcore.protocols import Sandbox
from katcore.schema.rollout import ExecResult
from katcore.testing.sandbox import SandboxContract

_MINE = """
import pytest
from katcore.testing.sandbox import SandboxContract

@pytest.fixture(scope="module")
def backend():
    return None

class TestMine(SandboxContract):
    has_door = has_changes = False
"""


class TestLocal(SandboxContract):
    """It offers everything."""

    has_snapshot = True
    has_live = os.geteuid() == 0


class Faulty:
    """A sandbox with something wrong: what a command gives, or what is read and written, is spoilt."""

    def __init__(self, sandbox: Sandbox, fault: str) -> None:
        self._sandbox = sandbox
        self._fault = fault

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> ExecResult:
        if self._fault == "one shell line":
            argv = ["sh", "-c", " ".join(argv)]
        try:
            limit_s = 60.0 if self._fault == "no time limit" else timeout_s
            result = await self._sandbox.exec(argv, cwd=cwd, env=env, timeout_s=limit_s)
        except SandboxTimeoutError:
            if self._fault == "timeout is a result":
                return ExecResult(124, b"", b"")
            raise
        spoilt: dict[str, Callable[[], ExecResult]] = {
            "success always": lambda: replace(result, exit_code=0),
            "stripped": lambda: replace(result, stdout=result.stdout.strip()),
            "one stream": lambda: replace(result, stdout=result.stdout + result.stderr, stderr=b""),
            "text": lambda: replace(result, stdout=result.stdout.decode(errors="replace").encode()),
            "truncated in silence": lambda: replace(result, truncated=False),
        }
        return spoilt.get(self._fault, lambda: result)()

    async def read(self, path: str) -> bytes:
        if self._fault == "no file is empty":
            try:
                return await self._sandbox.read(path)
            except FileNotFoundError:
                return b""
        return await self._sandbox.read(path)

    async def write(self, path: str, data: bytes) -> None:
        await self._sandbox.write(path, data.rstrip(b"\n") if self._fault == "stripped" else data)


Check = Callable[[SandboxContract, Sandbox], Awaitable[None]]
_FOUND_BY: list[tuple[str, Check]] = [
    ("success always", lambda c, s: c.test_the_exit_code_is_the_command_s(s, 3)),
    ("success always", lambda c, s: c.test_a_program_that_is_not_there_is_127_and_named(s)),
    ("success always", lambda c, s: c.test_privileged_commands_are_refused(s, "umount /proc")),
    ("success always", lambda c, s: c.test_there_is_no_way_out(s)),
    ("stripped", lambda c, s: c.test_output_is_exact_bytes_of_each_stream(s)),
    ("stripped", lambda c, s: c.test_what_is_written_is_read_exactly(s, b"\n\n")),
    ("one stream", lambda c, s: c.test_output_is_exact_bytes_of_each_stream(s)),
    ("text", lambda c, s: c.test_all_bytes_come_through(s)),
    ("one shell line", lambda c, s: c.test_arguments_reach_the_program_as_they_are(s)),
    ("truncated in silence", lambda c, s: c.test_output_beyond_the_limit_is_dropped_and_said(s, "stdout")),
    ("timeout is a result", lambda c, s: c.test_at_the_time_limit_a_command_ends(s)),
    ("no file is empty", lambda c, s: c.test_a_file_that_is_not_there_says_so(s)),
]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("fault", "check"), _FOUND_BY, ids=[fault for fault, _ in _FOUND_BY])
async def test_a_fault_is_found(sandbox: Sandbox, fault: str, check: Check) -> None:
    await check(SandboxContract(), Faulty(sandbox, "none"))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await check(SandboxContract(), Faulty(sandbox, fault))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_declaration_that_is_not_true_is_found(
    backend: LocalBackend, sandbox: Sandbox
) -> None:
    class Modest(SandboxContract):
        has_door = False

    with pytest.raises(AssertionError):
        await Modest().test_what_is_declared_is_so(backend, sandbox)


def test_what_is_left_out_is_reported_with_its_declaration(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(_MINE)
    command = [sys.executable, "-m", "pytest", "-rs", "-k", "given_once or in_tmp", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 skipped" in done.stdout, done.stdout + done.stderr
    for name in ("has_door", "has_changes"):
        assert f"left out by declaration: {name} = False" in done.stdout
