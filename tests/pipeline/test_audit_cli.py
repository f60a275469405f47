"""`kat audit` says 0 for what the log bears out, 1 for what it does not, and 2 for what is no log."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from typer.testing import CliRunner, Result

from katcore.cli import app
from katcore.pipeline.audit import audit_files
from katcore.schema.call import CallFailure, ModelCall
from katcore.schema.codec import to_json, write_lines
from katcore.schema.rollout import Flag, Verdict
from katcore.schema.sample import Sample
from katcore.trajectory.audit import audit_samples
from katcore.trajectory.formats import tree_sample
from tests.trajectory.made import Recorder, call, rollout, sessions


def session(name: str) -> tuple[list[ModelCall], Sample]:
    """Two calls that go on, and a passing one that forks, with answers in its prompt made from text."""
    first = call(0, (1, 2), (3, 4))
    fork = replace(call(2, (8,), (9,), first), num_shared=3, num_retokenised=2)
    calls = [replace(one, session_id=name) for one in (first, call(1, (5,), (6, 7), first), fork)]
    sample = tree_sample(rollout(calls))
    assert sample
    return calls, replace(sample, rollout_id=name)


def written(folder: Path) -> Path:
    """Two sessions whose calls stand between each other's."""
    made = [session(name) for name in "ab"]
    calls = [one for group in zip(*(calls for calls, _ in made), strict=True) for one in group]
    failure = CallFailure("busy", "a", "openai", "later", 0.0)
    write_lines(folder / "calls.jsonl", [calls[0], failure, *calls[1:]])
    write_lines(folder / "samples.jsonl", [sample for _, sample in made])
    return folder


def audited(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


def altered(folder: Path, **fields: Any) -> None:
    """Change the last sample."""
    path = folder / "samples.jsonl"
    lines = path.read_bytes().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | fields).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def test_a_clean_folder_is_proven(tmp_path: Path) -> None:
    result = audited(written(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "num_samples": 2,
        "num_trained_tokens": 6,
        "num_sessions": 2,
        "num_calls": 6,
        "num_exact": 4,
        "num_retokenised": 4,
        "num_forks": 2,
        "num_flagged": 0,
        "num_violations": 0,
        "violation": "",
        "exact_fraction": 4 / 6,
    }
    shown = re.sub(r"[^\w.%]+", " ", audited(tmp_path).stdout)
    assert "samples 2 trained tokens 6 sessions 2 calls 6 exact prompts 66.67%" in shown
    assert "retokenised answers 4 forks 2 flagged rollouts 0 violations 0" in shown


def test_a_flagged_rollout_that_was_rewarded_is_a_violation(tmp_path: Path) -> None:
    calls, _ = session("b")
    verdict = Verdict(0.0, flags=(Flag("canary", "it was read"),))
    one = replace(rollout(calls, verdict=verdict), id="b")
    write_lines(
        written(tmp_path) / "rollouts.jsonl", [replace(one, id="a", verdict=Verdict(1.0)), one]
    )
    result = audited(tmp_path)
    assert result.exit_code == 1
    assert "b: it was rewarded, though it is flagged: it was read" in result.stderr
    altered(tmp_path, reward=0.0)
    result = audited(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_flagged"] == 1


def test_the_first_violation_is_said(tmp_path: Path) -> None:
    altered(written(tmp_path), logprobs=[0.0] * 7)
    for arguments in ([], ["--json"]):
        result = audited(tmp_path, *arguments)
        assert result.exit_code == 1, result.output
        assert "not borne out by the call log: b: trained tokens" in result.stderr


def test_a_sample_of_no_session_is_a_violation(tmp_path: Path) -> None:
    altered(written(tmp_path), rollout_id="c")
    result = audited(tmp_path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["num_violations"] == 2


def test_an_answer_trained_twice_far_apart_is_found(tmp_path: Path) -> None:
    path = written(tmp_path) / "samples.jsonl"
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])
    assert audited(tmp_path).exit_code == 1


def test_files_can_be_named(tmp_path: Path) -> None:
    written(tmp_path)
    moved = (tmp_path / "samples.jsonl").rename(tmp_path / "other.jsonl")
    named = ("--samples", moved)
    assert audited(tmp_path, *named).exit_code == 0
    assert audited("--calls", tmp_path / "calls.jsonl", *named).exit_code == 0


def test_empty_files_hold_nothing_to_prove(tmp_path: Path) -> None:
    for name in ("calls.jsonl", "samples.jsonl"):
        (tmp_path / name).write_bytes(b"")
    result = audited(tmp_path)
    assert result.exit_code == 0
    assert "none" in result.stdout


@pytest.mark.parametrize(
    ("name", "line", "wanted"),
    [
        ("calls.jsonl", "{", "calls.jsonl, line 8: not a record with 'session_id'"),
        ("calls.jsonl", '{"session_id": "a"}', "calls.jsonl, line 8: not a valid ModelCall"),
        (
            "samples.jsonl",
            '{"rollout": "a"}',
            "samples.jsonl, line 3: not a record with 'rollout_id'",
        ),
        ("samples.jsonl", '{"rollout_id": "z"}', "samples.jsonl, line 3: not a valid Sample"),
        ("samples.jsonl", "[1]", "samples.jsonl, line 3: not a record"),
    ],
)
def test_a_line_that_is_no_record_is_named(
    tmp_path: Path, name: str, line: str, wanted: str
) -> None:
    path = written(tmp_path) / name
    path.write_text(path.read_text() + line + "\n")
    result = audited(tmp_path)
    assert result.exit_code == 2, result.output
    assert wanted in result.stderr


def test_a_torn_last_line_of_the_log_was_never_released(tmp_path: Path) -> None:
    path = written(tmp_path) / "calls.jsonl"
    path.write_bytes(path.read_bytes() + to_json(call(9, (1,), (2,)))[:-1])
    assert audited(tmp_path).exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["--calls", "nowhere"]])
def test_files_that_are_not_there_are_said(arguments: list[str]) -> None:
    result = audited(*arguments)
    assert result.exit_code == 2
    assert "calls.jsonl" in result.stderr


@given(one=sessions())
def test_by_file_or_in_memory_the_proof_is_the_same(
    one: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sample = tree_sample(rollout(one.calls))
    samples = [replace(sample, policy_version="x"), sample] if sample else []
    folder = tmp_path_factory.mktemp("audit")
    write_lines(folder / "calls.jsonl", one.calls)
    write_lines(folder / "samples.jsonl", samples)
    found = audit_files(folder / "calls.jsonl", folder / "samples.jsonl")
    audit = audit_samples(samples, {"s": one.calls})
    assert found.num_samples == audit.num_samples
    assert found.num_trained_tokens == audit.num_trained_tokens
    assert (found.num_violations, found.violation) == (
        len(audit.problems),
        next(iter(audit.problems), ""),
    )
