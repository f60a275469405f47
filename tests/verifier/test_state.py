"""The verifier of final states, in real sandboxes."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katcore.dataset.harbor import Draft, read_task, write_task
from katcore.errors import SandboxGoneError, VerifierError
from katcore.protocols import Sandbox
from katcore.schema.rollout import Flag, Trajectory, Verdict
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


async def test_a_process_that_outlives_the_tests_is_flagged(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    await output(sandbox, "setsid sleep 73001 >/dev/null 2>&1 &")
    script = f"setsid {{}} >/dev/null 2>&1 & echo 1 > {REWARD}\n"
    verdict = await judge(tmp_path / "1", sandbox, script.format("sleep 0.4"))
    assert verdict == Verdict(1.0), "it ends soon, and the other was there before"
    verdict = await judge(tmp_path / "2", sandbox, script.format("sleep 73002"))
    assert verdict == Verdict(1.0, flags=(Flag("survivor", "sleep outlived the tests"),))


async def test_a_survivor_is_seen_whatever_its_name(tmp_path: Path, sandbox: Sandbox) -> None:
    name = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) S 1\\n/b 2')"
    code = f"{name}; time.sleep(600)"
    script = f'setsid python3 -c "{code}" >/dev/null 2>&1 & sleep 0.5; echo 1 > {REWARD}\n'
    (flag,) = (await judge(tmp_path, sandbox, script)).flags
    assert flag.kind == "survivor"
    assert "a) S 1\n/b 2" in flag.detail


async def test_tests_that_are_changed_while_they_run_are_flagged(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    for change in ("echo x >> /tests/want", "rm /tests/want", "rm /tests/want; mkdir /tests/want"):
        script = f"{change}; touch /tests/new; echo 1 > {REWARD}\n"
        verdict = await judge(tmp_path / change[:12], sandbox, script, want="right\n")
        assert verdict.flags == (Flag("tests-changed", "while they ran: /tests/want"),)
        tmp_path = tmp_path / "next"


async def test_a_script_cannot_be_written_on_while_it_runs(
    tmp_path: Path, sandbox: Sandbox
) -> None:
    script = f'echo 0 > {REWARD}; echo "echo 1 > {REWARD}" >> /tests/test.sh\n: "{"x" * 9000}"\n'
    verdict = await judge(tmp_path, sandbox, script)
    assert (verdict.reward, [flag.kind for flag in verdict.flags]) == (0.0, ["tests-changed"])


async def test_a_script_knows_where_it_is(tmp_path: Path, sandbox: Sandbox) -> None:
    script = f'echo "$0 ${{BASH_SOURCE[0]}}"; set -e; echo 1 > {REWARD}; exit 3\n'
    assert (await judge(tmp_path, sandbox, script)) == Verdict(1.0, "/tests/test.sh /tests/test.sh")


async def test_a_sandbox_that_dies_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(SandboxGoneError):
        await judge(tmp_path, FakeSandbox({"write": SandboxGoneError("x")}), "true\n")
