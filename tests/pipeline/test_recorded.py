"""`kat format` and `kat import`: rollouts into other forms, and sessions of others into rollouts."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from katcore.cli import app
from katcore.schema.codec import read_lines, write_lines
from katcore.schema.rollout import Rollout
from tests.trajectory.made import call, rollout

ATIF = {
    "schema_version": "ATIF-v1.6",
    "session_id": "s1",
    "agent": {"name": "terminus", "version": "2.0", "model_name": "a-model"},
    "steps": [
        {"step_id": 1, "source": "user", "message": "greet"},
        {"step_id": 2, "source": "agent", "message": "hello"},
    ],
}


def kat(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    first = call(0, (1, 2), (3, 4))
    write_lines(tmp_path / "rollouts.jsonl", [rollout([first, call(1, (5,), (6,), first)])])
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_come_beside_the_rollouts(folder: Path) -> None:
    done = kat("format", "rows", folder)
    assert done.exit_code == 0, done.output
    assert f"1 rows in {folder / 'rows.jsonl'}" in done.stderr.replace("\n", "")
    (row,) = lines(folder / "rows.jsonl")
    assert row["completion_token_ids"] == [3, 4, 5, 6]
    assert sorted(path.name for path in folder.iterdir()) == ["rollouts.jsonl", "rows.jsonl"]


def test_several_files_make_one_with_options_of_the_formatter(folder: Path) -> None:
    source = folder / "rollouts.jsonl"
    target = folder / "chats"
    done = kat("format", "chat", source, folder, "-o", "min_reward=null", "--out", target)
    assert done.exit_code == 0, done.output
    assert len(lines(target)) == 2
    assert (
        kat("format", "chat", source, folder, "-o", "dedupe=true", "--out", target).exit_code == 0
    )
    assert len(lines(target)) == 1


def test_rows_can_be_printed(folder: Path) -> None:
    done = kat("format", "rows", folder, "--out", "-")
    assert json.loads(done.stdout)["branch"] == 0
    assert [path.name for path in folder.iterdir()] == ["rollouts.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "."], "no formatter named 'nothing'"),
        (["chat", ".", "-o", "min_reward"], "write it as NAME=VALUE"),
        (["chat", ".", "-o", "min_reward={"], "is not YAML"),
        (["chat", ".", "-o", "rewards=1"], "it takes: roles, min_reward"),
        (["chat", "elsewhere"], "no such file or folder"),
        (["chat", ".", "--out", "rollouts.jsonl"], "is what is to be read"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    before = (folder / "rollouts.jsonl").read_bytes()
    done = kat("format", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert [path.name for path in folder.iterdir()] == ["rollouts.jsonl"]
    assert (folder / "rollouts.jsonl").read_bytes() == before


def test_a_broken_line_leaves_the_earlier_rows_alone(folder: Path) -> None:
    assert kat("format", "rows", folder).exit_code == 0
    before = (folder / "rows.jsonl").read_bytes()
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write('{"id": 3}\n')
    done = kat("format", "rows", folder)
    assert "line 2" in done.stderr
    assert (folder / "rows.jsonl").read_bytes() == before


def test_sessions_of_others_become_rollouts_that_can_be_formatted(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(json.dumps(ATIF | {"session_id": name}))
    out = tmp_path / "rollouts.jsonl"
    done = kat("import", "atif", tmp_path / "a", tmp_path / "b", "--out", out)
    assert done.exit_code == 0, done.output
    assert [item.id for item in read_lines(Rollout, out)] == ["a", "b"]
    again = kat("import", "atif", tmp_path / "a", "--out", out)
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    assert kat("format", "chat", out, "-o", "min_reward=null").exit_code == 0
    assert [row["messages"][-1]["content"] for row in lines(tmp_path / "chat.jsonl")] == [
        "hello"
    ] * 2


def test_an_import_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(json.dumps(ATIF))
    (tmp_path / "b").write_text("{}")
    out = tmp_path / "rollouts.jsonl"
    done = kat("import", "atif", tmp_path / "a", tmp_path / "b", "--out", out)
    assert done.exit_code == 2
    assert "schema_version" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert "choose one of: atif, claude-code, opencode, verifiers" in " ".join(
        kat("import", "nothing", out).stderr.split()
    )
