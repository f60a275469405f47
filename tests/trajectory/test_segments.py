"""Segments: whole, read back as they were, under any root that fsspec can write."""

from pathlib import Path

import pytest

from katcore.errors import StageError
from katcore.schema.codec import to_json
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Verdict
from katcore.trajectory.segments import CallLines, Segments


def rollout(name: str) -> bytes:
    return to_json(
        Rollout(name, "t", "swe", "g", 0, Outcome.SCORED, Trajectory(name, ()), Verdict(1.0))
    )


@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
def test_a_segment_comes_back_as_it_was(tmp_path: Path, scheme: str) -> None:
    root = f"{scheme}{tmp_path}/kept"
    names = ["a/b ü%2F.0", "a", "rl-12.task.3"]
    for name in names:
        Segments(root).write(name, b'{"x":1}\n{"y":2}\n', rollout(name))
    segments = Segments(root)
    assert segments.names() == sorted(names)
    for name in names:
        assert segments.read(name) == (b'{"x":1}\n{"y":2}\n', rollout(name) + b"\n")


def test_a_rollout_without_calls_is_kept(tmp_path: Path) -> None:
    segments = Segments(str(tmp_path))
    segments.write("a", b"", rollout("a"))
    assert segments.read("a") == (b"", rollout("a") + b"\n")


def test_a_half_written_segment_is_none(tmp_path: Path) -> None:
    segments = Segments(str(tmp_path))
    segments.write("a", b"", rollout("a"))
    (tmp_path / "b.jsonl.gz.partial").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:20])
    assert segments.names() == ["a"]


@pytest.mark.parametrize("damage", [slice(0, 30), slice(5, None), slice(0, 0)])
def test_a_damaged_segment_is_an_error(tmp_path: Path, damage: slice) -> None:
    segments = Segments(str(tmp_path))
    segments.write("a", b"{}\n", rollout("a"))
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(file.read_bytes()[damage])
    with pytest.raises(StageError, match=r"a\.jsonl\.gz: the segment cannot be read"):
        segments.read("a")


def test_lines_of_a_growing_log_are_found_by_session(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    log.write_bytes(
        b'{"session_id":"a","n":1}\n{"session_id":"b"}\n{"session_id":"a","n":2}\n{"sess'
    )
    lines = CallLines(log)
    assert lines.take("a") == b'{"session_id":"a","n":1}\n{"session_id":"a","n":2}\n'
    assert lines.take("a") == b""
    with log.open("ab") as file:
        file.write(b'ion_id":"c"}\n')
    assert lines.sessions() == {"b", "c"}
    assert lines.take("c") == b'{"session_id":"c"}\n'
