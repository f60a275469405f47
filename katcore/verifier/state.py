"""Judge the state that the agent left, by the task's own `tests/test.sh`."""

import asyncio

from pydantic import BaseModel, ConfigDict

from katcore.errors import VerifierError
from katcore.protocols import Sandbox
from katcore.schema.rollout import Trajectory, Verdict
from katcore.schema.task import Task

REWARD_PATH = "/logs/verifier/reward.txt"
_UNLOCK = r"find /tests /logs -type d -exec chmod u+rwx {} \;"
_RESET = (
    f"rm -rf /tests /logs 2>/dev/null || {{ {_UNLOCK}; rm -rf /tests /logs; }};"
    " mkdir -p /tests /logs/verifier"
)


class TestScriptConfig(BaseModel):
    """Options of the verifier. `timeout_s` bounds the test script."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout_s: float = 30.0


class TestScriptVerifier:
    """Runs `bash /tests/test.sh`; the reward is what it wrote to /logs/verifier/reward.txt.

    Tests enter the sandbox only here; whatever the agent left at their place is removed first. A script that
    does not finish in time is a reward of 0: the agent's code hangs. One that writes no reward is broken.
    """

    def __init__(self, config: TestScriptConfig) -> None:
        self._timeout_s = config.timeout_s

    async def verify(self, task: Task, sandbox: Sandbox, trajectory: Trajectory) -> Verdict:
        """See `Verifier.verify`."""
        await sandbox.exec(["bash", "-c", _RESET])
        tests = task.directory / "tests"
        for path in sorted(tests.rglob("*")):
            if path.is_file():
                data = await asyncio.to_thread(path.read_bytes)
                await sandbox.write(f"/tests/{path.relative_to(tests)}", data)
        command = f"timeout -k 1 {self._timeout_s} bash /tests/test.sh"
        result = await sandbox.exec(["bash", "-c", command], timeout_s=self._timeout_s + 10)
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
        return Verdict(reward, output)
