"""The verifier of final states, in real sandboxes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katcore.dataset.harbor import Draft, read_task, write_task
from katcore.errors import SandboxGoneError, VerifierError
from katcore.protocols import Sandbox
from katcore.schema.rollout import Trajectory, Verdict
from katcore.verifier.state import TestScriptConfig as Config
from katcore.verifier.state import TestScriptVerifier as Verifier
from tests.kat_sandboxes.machines import opened, output
from tests.rollout.fakes import FakeSandbox

REWARD = "/logs/verifier/reward.txt"


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    async with opened(tmp_path / "images") as made:
        yield made


async def judge(
    tmp_path: Path, sandbox: Sandbox, script: str, *, timeout_s: float = 20.0, **files: str
) -> Verdict:
    tests = {"test.sh": script.encode(), **{name: text.encode() for name, text in files.items()}}
    draft = Draft("t", "d", "p", {"Dockerfile": b"FROM host\n"}, tests, [])
    task = read_task(write_task(tmp_path / "tasks", "train", draft))
    verifier = Verifier(Config(timeout_s=timeout_s))
    return await verifier.verify(task, sandbox, Trajectory("s", ()))


async def test_the_reward_is_what_the_script_wrote(tmp_path: Path, sandbox: Sandbox) -> None:
    await output(sandbox, "echo right > answer")
    script = (
        f'[ "$(cat answer)" = "$(cat /tests/want)" ] && echo 0.5 > {REWARD}; echo said; exit 1\n'
    )
    verdict = await judge(tmp_path, sandbox, script, want="right\n")
    assert verdict == Verdict(0.5, "said")


async def test_what_the_agent_left_in_the_verifier_s_places_is_gone(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    await output(
        sandbox, f"mkdir -p /tests; echo 1 > {REWARD}; echo > /tests/more; chmod 0 /logs /tests"
    )
    script = f"[ -e {REWARD} ] || [ -e /tests/more ]; echo $? > {REWARD}\n"
    assert (await judge(tmp_path, sandbox, script)).reward == 1.0


@pytest.mark.parametrize("place", ["/tests", "/logs", "/logs/verifier"])
async def test_links_in_its_places_lead_nowhere(
    tmp_path: Path, sandbox: Sandbox, place: str
) -> None:
    await output(sandbox, f"mkdir /trap; rm -rf {place}; ln -s /trap {place}")
    assert (await judge(tmp_path, sandbox, f"echo 1 > {REWARD}\n")).reward == 1.0
    assert await output(sandbox, "ls /trap") == ""


async def test_a_script_that_hangs_is_a_reward_of_zero(tmp_path: Path, sandbox: Sandbox) -> None:
    verdict = await judge(tmp_path, sandbox, "python3 -c 'while True: pass'\n", timeout_s=0.5)
    assert verdict.reward == 0.0
    assert "did not finish within 0.5 s" in verdict.reason


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo why >&2\n", "left no reward .*why"),
        (f"echo yes > {REWARD}\n", "left no reward .*yes"),
        (f"echo 2 > {REWARD}\n", "a reward of 2.0, not in"),
        (f"echo nan > {REWARD}\n", "a reward of nan, not in"),
        (f"mkdir {REWARD}\n", "left no reward"),
        (f"mkfifo {REWARD}\n", "left no reward"),
    ],
)
async def test_a_script_that_gives_no_reward_is_the_verifier_s_fault(
    tmp_path: Path, sandbox: Sandbox, script: str, message: str
) -> None:
    with pytest.raises(VerifierError, match=message):
        await judge(tmp_path, sandbox, script)


async def test_a_sandbox_that_dies_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(SandboxGoneError):
        await judge(tmp_path, FakeSandbox({"write": SandboxGoneError("x")}), "true\n")
