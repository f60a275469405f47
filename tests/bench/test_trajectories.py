"""The benchmark of trajectories measures what it says, and on the session that it says."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from katcore.bench import trajectories
from katcore.bench.agent import SELDOM, Agent
from katcore.bench.body import DIALECTS
from katcore.bench.trajectories import Settings
from katcore.cli import app
from katcore.schema.call import ModelCall
from katcore.trajectory.calls import read_calls
from katcore.trajectory.raw import restore
from katcore.trajectory.tree import build_trajectory


async def worked(folder: Path, num_calls: int) -> list[ModelCall]:
    agent = Agent(folder / "calls.jsonl", "chat-completions", 0)
    await agent.work(num_calls)
    agent.close()
    return list(read_calls(folder / "calls.jsonl"))


async def test_the_session_has_all_that_agents_do(tmp_path: Path) -> None:
    calls = await worked(tmp_path / "a", 320)
    roles = [turn.role for turn in build_trajectory("bench", calls).turns]
    assert roles.count("subagent") >= 8 * (240 // SELDOM.subagent)
    assert roles.count("discarded") >= 240 // SELDOM.again - 1
    assert roles.count("post-compaction") >= 5
    assert roles.count("auxiliary") == 1, "the summary"
    inexact = [call for call in calls if not call.is_exact]
    assert not inexact, "answers come back by their ids"
    again = await worked(tmp_path / "b", 320)
    assert [call.generation for call in again] == [call.generation for call in calls]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_conversation_is_one_in_every_dialect(tmp_path: Path, dialect: str) -> None:
    agent = Agent(tmp_path / "calls.jsonl", dialect, 1)
    sent = await agent.converse(6)
    agent.close()
    calls = list(read_calls(tmp_path / "calls.jsonl"))
    assert [call.num_shared_messages for call in calls] == [0, 3, 5, 7, 9, 11]
    assert all(call.is_exact for call in calls)
    bodies = restore(calls)
    assert bodies[calls[-1].call_id] == agent.last_body
    assert sent == sum(len(json.dumps(body, separators=(",", ":"))) for body in bodies.values())


async def test_the_report_has_a_bound_and_an_aim_for_each_figure(tmp_path: Path) -> None:
    steps: list[str] = []
    settings = Settings(calls=30, turns=6, rounds=1)
    report = await trajectories.run(settings, tmp_path, steps.append)
    assert len(steps) == settings.num_parts
    assert {(item.writers, item.is_synced) for item in report.written} >= {(1, True), (64, True)}
    for item in report.written:
        assert item.calls_per_s > 0
        assert item.bare_calls_per_s > 0
        ratio = item.gb_per_s / item.bare_gb_per_s
        assert ratio == pytest.approx(item.calls_per_s / item.bare_calls_per_s)
    assert report.built.turns >= 30
    assert 0 < report.built.tree_tokens <= report.built.tokens
    for one in report.logged:
        assert one.text_bytes < one.unique_bytes < one.sent_bytes
        assert one.ratio == one.log_bytes / one.unique_bytes
    assert len(report.aims) == 4
    assert os.listdir(tmp_path) == [], "nothing is left"


def test_the_command_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    command = ["bench", "trajectories", "--calls", "8", "--turns", "3", "--rounds", "1"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["built"]["turns"] == 8
    assert {item["dialect"] for item in found["logged"]} == set(DIALECTS)
    result = CliRunner().invoke(app, command)
    assert "7/7" in result.stderr
    assert "log / unique" in result.stdout
