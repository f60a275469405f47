"""Files that were written with an earlier version can still be read: one golden file per record.

A record that changes shape gets a new `schema_version` and a new file; the old file stays.
"""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import katcore.schema
from katcore.errors import StageError
from katcore.schema.call import Generation, Message, ModelCall, Sampling, Tool, ToolCall
from katcore.schema.codec import from_json, read_lines, to_json, write_lines
from katcore.schema.rollout import Flag, Outcome, Rollout, Trajectory, Turn, Verdict, Visit
from katcore.schema.sample import Sample

GOLDEN = Path(__file__).parent / "golden"
_LS = ToolCall("call_1", "bash", '{"command": "ls"}')
_BASH = Tool("bash", "runs a command", '{"type": "object"}')
_CALL = ModelCall(
    call_id="c2",
    session_id="r1",
    parent="c1",
    num_shared_messages=3,
    new_messages=(
        Message("tool", 'say "é\n"', tool_call_id="call_0", images=("data:image/png;base64,AA",)),
        Message("assistant", "", "hm", (_LS,)),
    ),
    num_shared=7,
    new_prompt_ids=(5, 6, 7),
    generation=Generation(
        (8, 3), (-0.125, -2.5), "ls", "stop", "rl-12", "sampled", "because", (_LS,), (11, 2)
    ),
    requested=Sampling(0.2, 1 << 30, 5, 0.9, 40, 0.5, 0.25),
    used=Sampling(1.0, 64, None),
    started_s=1700000000.25,
    finished_s=1700000001.5,
    num_retokenised=1,
    tools=(_BASH,),
    dialect="responses",
    raw="abc",
    extra={"k": "v"},
)
_ROLLOUT = Rollout(
    id="rl-1.t1.0.abc",
    task_id="t1",
    domain="terminal",
    group="sort",
    attempt=2,
    outcome=Outcome.SCORED,
    trajectory=Trajectory(
        "rl-1.t1.0.abc",
        (
            Turn(-1, 0, 0, (5, 6), (8, 3), (-0.125, -2.5), (Message("user", "x"),), "ls", "rl-12"),
            Turn(
                parent=0,
                num_shared_messages=2,
                num_shared=4,
                prompt_ids=(9,),
                ids=(3,),
                logprobs=(-1.0,),
                messages=(),
                text="",
                policy_version="rl-12",
                origin="scripted",
                role="discarded",
                reasoning="hm",
                tool_calls=(_LS,),
                tools=(_BASH,),
                is_exact=False,
                started_s=1.5,
                seconds=0.5,
            ),
        ),
    ),
    verdict=Verdict(0.5, "half", {"tests": 2.0}, (Flag("canary", "it was read"),), is_live=True),
    exit_reason="submitted",
    seconds={"agent": 1.5},
    scaffold="claude-code 2.1.330",
    visits=(Visit("pypi.org", 443, "151.101.0.223", "", 517, 4096),),
)
_SAMPLE = Sample(
    (5, 6, 8), (-1, 0, 1), (False, False, True), (0.0, 0.0, -0.125), (1, 1, 1),
    "r1", "t1", "swe", None, "tokenised", "", (0,), "cline 3.0.65", ("2", "3"),
)  # fmt: skip
RECORDS: dict[str, Any] = {"call-1": _CALL, "rollout-1": _ROLLOUT, "sample": _SAMPLE}


def records_with_a_version() -> set[type]:
    found = set()
    for module in pkgutil.iter_modules(katcore.schema.__path__):
        for item in vars(importlib.import_module(f"katcore.schema.{module.name}")).values():
            if dataclasses.is_dataclass(item) and isinstance(item, type):
                names = {field.name for field in dataclasses.fields(item)}
                if "schema_version" in names:
                    found.add(item)
    return found


def test_every_record_with_a_version_has_a_golden_file_of_that_version() -> None:
    for record in records_with_a_version():
        (version,) = (f.default for f in dataclasses.fields(record) if f.name == "schema_version")
        name = {"ModelCall": "call"}.get(record.__name__, record.__name__.lower())
        assert (GOLDEN / f"{name}-{version}.json").exists(), record
        assert type(RECORDS[f"{name}-{version}"]) is record


@pytest.mark.parametrize("name", RECORDS)
def test_the_golden_file_reads_as_the_record_and_back(name: str) -> None:
    golden = (GOLDEN / f"{name}.json").read_bytes().rstrip(b"\n")
    record = RECORDS[name]
    assert from_json(type(record), golden) == record
    assert json.loads(to_json(record)) == json.loads(golden)


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_in_the_golden_file(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_bytes())
    assert set(golden) == {field.name for field in dataclasses.fields(RECORDS[name])}


def test_no_golden_file_is_forgotten() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(RECORDS)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'{"call_id": 1}', b"\xff"])
def test_what_is_no_record_is_an_error(data: bytes) -> None:
    with pytest.raises(StageError, match="not a valid ModelCall"):
        from_json(ModelCall, data)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert write_lines(tmp_path / "x.jsonl", [_SAMPLE, _SAMPLE]) == 2
    assert list(read_lines(Sample, tmp_path / "x.jsonl")) == [_SAMPLE, _SAMPLE]
    assert write_lines(tmp_path / "none.jsonl", []) == 0
    assert list(read_lines(Sample, tmp_path / "none.jsonl")) == []


def test_a_record_cannot_be_changed() -> None:
    for record in RECORDS.values():
        name = dataclasses.fields(record)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, None)


def test_only_a_scored_rollout_has_a_reward() -> None:
    for outcome in Outcome:
        rollout = dataclasses.replace(_ROLLOUT, outcome=outcome)
        assert rollout.reward == (0.5 if outcome is Outcome.SCORED else None)
