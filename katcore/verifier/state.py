"""Judge the state that the agent left, by the task's own `tests/test.sh`."""

import asyncio
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from katcore.errors import VerifierError
from katcore.protocols import Sandbox
from katcore.schema.rollout import Flag, Trajectory, Verdict
from katcore.schema.task import Task

REWARD_PATH = "/logs/verifier/reward.txt"
_UNLOCK = r"find /tests /logs -type d -exec chmod u+rwx {} \;"
_RESET = (
    f"rm -rf /tests /logs 2>/dev/null || {{ {_UNLOCK}; rm -rf /tests /logs; }};"
    " mkdir -p /tests /logs/verifier"
)
_RUN = "timeout -k 1 {} bash -c 'source /tests/test.sh' /tests/test.sh"
"""`source` reads the whole file before any of it runs: code under test cannot write on at its end."""
_LIST = r"echo $$; exec grep -sE '^Uid:|^[0-9]|\)' /proc/[0-9]*/stat /proc/[0-9]*/status"
_PATIENCE_S, _RETRY_S = 1.0, 0.1
"""How long a process may take to die after the tests."""
_STARTED = 19
"""Where in /proc/PID/stat, from the state on, it says when the process was started: proc(5)."""


class TestScriptConfig(BaseModel):
    """Options of the verifier. `timeout_s` bounds the test script."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout_s: float = 30.0


class TestScriptVerifier:
    """Runs `/tests/test.sh` with bash; the reward is what it wrote to /logs/verifier/reward.txt.

    Tests enter the sandbox only here; whatever the agent left at their place is removed first. A script that
    does not finish in time is a reward of 0: the agent's code hangs. One that writes no reward is broken.
    What the tests started has to end with them: a process of the agent's code that outlives them could have
    written the reward, so it is a flag, and so is a test file that is not what it was.
    """

    def __init__(self, config: TestScriptConfig) -> None:
        self._timeout_s = config.timeout_s

    async def verify(self, task: Task, sandbox: Sandbox, trajectory: Trajectory) -> Verdict:
        """See `Verifier.verify`."""
        await sandbox.exec(["bash", "-c", _RESET])
        tests = await asyncio.to_thread(_tests, task.directory / "tests")
        for path, data in tests.items():
            await sandbox.write(path, data)
        before = await _processes(sandbox)
        result = await sandbox.exec(
            ["bash", "-c", _RUN.format(self._timeout_s)], timeout_s=self._timeout_s + 10
        )
        if result.exit_code in {124, 137}:
            return Verdict(0.0, f"the tests did not finish within {self._timeout_s:g} s")
        try:
            reward = float(await sandbox.read(REWARD_PATH))
        except (OSError, ValueError) as error:
            tail = (result.stdout + result.stderr)[-300:].decode(errors="replace")
            raise VerifierError(f"{task.id}: test.sh left no reward ({error}): {tail}") from error
        if not 0.0 <= reward <= 1.0:
            raise VerifierError(f"{task.id}: test.sh wrote a reward of {reward}, not in [0, 1]")
        output = result.stdout[-300:].decode(errors="replace").strip()
        flags = (*await _survivors(sandbox, before), *await _changed(sandbox, tests))
        return Verdict(reward, output, flags=flags)


def _tests(folder: Path) -> dict[str, bytes]:
    """All files of the tests, by their path in the sandbox."""
    return {
        f"/tests/{path.relative_to(folder)}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


async def _processes(sandbox: Sandbox) -> dict[tuple[int, int], str]:
    """The names of what runs as who asks, but for that command, by pid and when it was started."""
    own, *lines = (
        (await sandbox.exec(["sh", "-c", _LIST])).stdout.decode(errors="replace").splitlines()
    )
    files: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        # A process's name may have line ends in it: before each line, grep says whose it is.
        path, _, text = line.partition(":")
        pid, _, file = path.removeprefix("/proc/").partition("/")
        files.setdefault((pid, file), []).append(text)
    users = {pid: _user(text) for (pid, file), text in files.items() if file == "status"}
    if own not in users:
        raise VerifierError(f"its processes cannot be seen: {own[:100]}")
    found = {}
    for pid in (pid for pid, user in users.items() if user == users[own] and pid != own):
        head, _, rest = "\n".join(files.get((pid, "stat"), ())).rpartition(") ")
        words = rest.split()
        if len(words) > _STARTED and words[0] not in {"Z", "X"}:
            found[int(pid), int(words[_STARTED])] = head.partition(" (")[2]
    return found


def _user(status: list[str]) -> str:
    return next((line for line in status if line.startswith("Uid:")), "")


async def _survivors(sandbox: Sandbox, before: dict[tuple[int, int], str]) -> list[Flag]:
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        now = await _processes(sandbox)
        names = sorted({name for key, name in now.items() if key not in before})
        if not names or time.monotonic() > until_s:
            return [Flag("survivor", f"{', '.join(names)} outlived the tests")] if names else []
        await asyncio.sleep(_RETRY_S)


async def _changed(sandbox: Sandbox, tests: dict[str, bytes]) -> list[Flag]:
    changed = []
    for path, data in tests.items():
        try:
            is_same = await sandbox.read(path) == data
        except OSError:
            is_same = False
        if not is_same:
            changed.append(path)
    return [Flag("tests-changed", f"while they ran: {', '.join(changed)}")] if changed else []
