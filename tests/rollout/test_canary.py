"""Canaries: reading one is noticed however it is passed on, and nothing else is."""

import asyncio
import base64
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from katcore.rollout.canary import Canaries, plant
from katcore.schema.call import Message, ToolCall
from katcore.schema.rollout import ExecResult, Flag, Trajectory, Turn
from tests.rollout.fakes import FakeSandbox

CANARIES = Canaries("kat0123456789abcdef0123456789abcdef", ("/solution/solve.sh",))
WORD = CANARIES.word


def heard(*messages: Message, text: str = "", calls: tuple[ToolCall, ...] = ()) -> Trajectory:
    first = Turn(-1, 0, 0, (), (), (), (Message("user", "do it"),), "ls", "p")
    second = Turn(0, 2, 0, (), (), (), messages, text, "p", tool_calls=calls)
    return Trajectory("s", (first, second))


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", "some text before it\n"])
@pytest.mark.parametrize("after", ["", "\n", "xy and more of it, so that lines are long"])
def test_it_is_noticed_in_any_form(before: str, after: str) -> None:
    text = f"{before}{WORD}{after}"
    for form in (
        text,
        text[::-1],
        text.encode().hex(),
        text.encode().hex(" ").upper(),
        base64.b64encode(text.encode()).decode(),
        base64.encodebytes(text.encode()).decode(),
        base64.urlsafe_b64encode(text.encode()).decode(),
        "\n".join(text),
    ):
        assert CANARIES.flags(heard(Message("user", form)), b""), form
        assert CANARIES.flags(heard(), b"\0" + CANARIES.content + form.encode() + b"\0"), form


def test_it_says_where() -> None:
    call = ToolCall("c", "write", f'{{"text": "{WORD}"}}')
    seen = "/solution/solve.sh was read: see turn 1"
    for trajectory in (
        heard(Message("tool", WORD)),
        heard(text=WORD),
        heard(calls=(call,)),
        heard(Message("assistant", "", f"hm, {WORD}")),
    ):
        assert CANARIES.flags(trajectory, b"") == (Flag("canary", seen),)
    both = CANARIES.flags(heard(text=WORD), 2 * CANARIES.content)
    assert both == (Flag("canary", f"{seen}, what it left behind"),)


def test_nothing_else_is_noticed() -> None:
    other = heard(Message("user", f"{WORD[:-1]} /solution/solve.sh"), text="cat /solution/solve.sh")
    assert CANARIES.flags(other, base64.b64encode(WORD[:20].encode())) == ()
    assert CANARIES.flags(heard(), b"it was not taken away: " + CANARIES.content) == ()
    assert Canaries(WORD, ()).flags(heard(text=WORD), WORD.encode()) == ()


async def test_what_is_there_already_is_left_alone() -> None:
    sandbox = FakeSandbox()
    sandbox.files["/own"] = b"the task's"
    one, two = await plant(sandbox, ["/own", "/new"]), await plant(FakeSandbox(), ["/new"])
    assert one.paths == ("/new",)
    assert sandbox.files["/own"] == b"the task's"
    assert sandbox.files["/new"].count(one.word.encode()) == 2
    assert one.word != two.word


class Shell(FakeSandbox):
    """Runs commands on this machine."""

    async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, check=False)
        return ExecResult(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("data", "is_left"),
    [
        (CANARIES.content, False),
        (b"mine", True),
        (b"", True),
        (CANARIES.content + b"more\n", True),
        (CANARIES.content + b"more", True),
        (CANARIES.content.replace(b"\n", b" \n"), True),
        (CANARIES.content.replace(b"kat", b"cat"), True),
    ],
)
async def test_what_the_agent_wrote_at_its_place_is_its_own(
    tmp_path: Path, data: bytes, *, is_left: bool
) -> None:
    path, gone = tmp_path / "a folder" / "solve.sh", tmp_path / "gone" / "solve.sh"
    path.parent.mkdir()
    path.write_bytes(data)
    (tmp_path / "own").touch()
    await Canaries(WORD, (str(gone), str(path))).remove(Shell())
    assert path.exists() == is_left
    assert path.parent.exists() == is_left, "a folder that was made for it goes with it"
    assert (tmp_path / "own").exists()
