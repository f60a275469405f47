"""The call log on disk: whole lines or none, whatever happens."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from katcore.errors import ProxyError, StageError
from katcore.trajectory.calls import CallLog, calls_by_session, read_calls
from tests.trajectory.made import call


async def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    calls = [call(n, (n,), (1, 2)) for n in range(40)]
    log = CallLog(tmp_path / "new" / "calls.jsonl")
    for one in calls[:5]:
        await log.append(one)
    await asyncio.gather(*map(log.append, calls[5:]))
    log.close()
    assert list(read_calls(tmp_path / "new" / "calls.jsonl")) == calls
    assert calls_by_session(tmp_path / "new" / "calls.jsonl") == {"s": calls}


async def test_an_appended_call_is_on_disk_at_once(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "calls.jsonl")
    for number in range(3):
        await log.append(call(number, (1,), (2,)))
        assert len(list(read_calls(tmp_path / "calls.jsonl"))) == number + 1
    log.close()


@pytest.mark.parametrize("torn", [b"{", b'{"call_id": "x"', b"\0" * 200_000])
async def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "calls.jsonl"
    log = CallLog(path)
    await log.append(call(0, (1,), (2,)))
    log.close()
    with path.open("ab") as file:
        file.write(torn)
    assert [one.call_id for one in read_calls(path)] == ["c0"]
    log = CallLog(path)
    await log.append(call(1, (1,), (2,)))
    log.close()
    assert [one.call_id for one in read_calls(path)] == ["c0", "c1"]


async def test_a_file_of_nothing_but_a_torn_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_bytes(b"x" * 70_000)
    CallLog(path).close()
    assert path.read_bytes() == b""


async def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    log = CallLog(path)
    await log.append(call(0, (1,), (2,)))
    log.close()
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(StageError, match="not a valid ModelCall"):
        list(read_calls(path))


async def test_the_log_is_for_its_owner_alone(tmp_path: Path) -> None:
    CallLog(tmp_path / "calls.jsonl").close()
    assert os.stat(tmp_path / "calls.jsonl").st_mode & 0o777 == 0o600


_FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from katcore.errors import ProxyError
from katcore.trajectory.calls import CallLog
from tests.trajectory.made import call

async def main():
    log = CallLog(Path(sys.argv[1]))
    for number in range(100):
        try:
            await log.append(call(number, (1,), (2,)))
        except ProxyError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
            await log.append(call(1000, (1,), (2,)))
            print(number, error)
            return

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 1 << 30))
asyncio.run(main())
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    said = subprocess.check_output([sys.executable, "-c", _FULL, str(path)], text=True)
    num = int(said.split()[0])
    assert "the call log cannot be written" in said
    assert 3 < num < 20
    assert [one.call_id for one in read_calls(path)] == [*(f"c{n}" for n in range(num)), "c1000"]


async def test_a_full_disk_fails_every_call_that_waited(tmp_path: Path) -> None:
    (tmp_path / "calls.jsonl").symlink_to("/dev/full")
    log = CallLog(tmp_path / "calls.jsonl")
    results = await asyncio.gather(
        *(log.append(call(n, (1,), (2,))) for n in range(5)), return_exceptions=True
    )
    log.close()
    assert [type(result) for result in results] == [ProxyError] * 5
