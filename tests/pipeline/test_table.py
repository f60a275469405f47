"""The last run's table: what is remembered, what is said before there is one, and `kat report`."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from katcore.cli import app
from katcore.config import Preset
from katcore.errors import StageError
from katcore.pipeline import table
from katcore.pipeline.gate import COLUMNS
from katcore.pipeline.plan import Plan, StageSpec
from tests.pipeline.test_page import KEY, stage

DASH = "\N{EN DASH}"
IDS = ("shell.register", "swe.register", "unified.gate", "unified.register")
PLAN = Plan(
    Preset(name="p", summary=""),
    3,
    ("shell", "swe"),
    {name: StageSpec(name, name.partition(".")[2]) for name in IDS},
    dict.fromkeys(IDS, KEY),
)
MODELS = {"kat-shell": "2", "kat-swe": "1", "kat-unified": "4"}


def rate(value: float) -> dict[str, float]:
    return {"rate": value, "low": value / 2, "high": (1 + value) / 2, "n": 40}


def domain(*rates: float) -> dict[str, Any]:
    columns = {column: rate(value) for column, value in zip(COLUMNS, rates, strict=True)}
    return columns | {"sampled": {column: rate(0.125) for column in COLUMNS}}


def check(name: str, value: float | None, *, is_held: bool) -> dict[str, Any]:
    numbers = dict.fromkeys(("value", "low", "high"), value)
    return {"domain": name, "what": "unified / RL", "wanted": ">= 0.95", "held": is_held, **numbers}


def report() -> dict[str, Any]:
    checks = [check("shell", 1.0, is_held=True), check("swe", None, is_held=False)]
    return {
        "preset": "p[x]",
        "seed": 3,
        "domains": {"shell": domain(0.0, 0.25, 0.5, 0.5), "swe": domain(0.0, 0.0, 0.0, 0.75)},
        "gate": {"held": False, "checks": checks},
    }


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def gate(home: Path) -> Path:
    """The gate's folder of a run that ended."""
    for name, version in MODELS.items():
        folder = stage(home / "stages", f"{name.removeprefix('kat-')}.register")
        (folder / "version.json").write_text(json.dumps({"name": name, "version": version}))
    folder = stage(home / "stages", "unified.gate")
    (folder / "report.json").write_text(json.dumps(report()))
    return folder


def shown(what: RenderableType) -> list[str]:
    """What a terminal shows, line by line, with single spaces."""
    file = io.StringIO()
    Console(file=file, width=160, color_system=None).print(what)
    return [" ".join(line.replace("│", " ").split()) for line in file.getvalue().splitlines()]


def test_a_run_is_remembered_with_its_models(gate: Path) -> None:
    table.remember(PLAN)
    assert table.last_report() == report() | {"models": MODELS}


def test_its_pages_are_written(gate: Path, home: Path) -> None:
    table.remember(PLAN)
    assert "kat-unified v4" in (home / "report" / "index.html").read_text()
    assert f">{DASH}<" in (home / "report" / "index.html").read_text(), "a ratio that is undefined"
    assert not list(home.glob("*.tmp"))


def test_the_last_run_is_the_one_remembered(gate: Path) -> None:
    table.remember(PLAN)
    (gate / "report.json").write_text(json.dumps(report() | {"seed": 4}))
    table.remember(PLAN)
    assert table.last_report()["seed"] == 4


def test_without_a_run_it_is_said_how_to_start_one(home: Path) -> None:
    with pytest.raises(StageError, match=r"no finished run in .*; start one with `kat run`"):
        table.last_report()


def test_a_run_whose_folder_was_removed_is_no_crash(gate: Path) -> None:
    table.remember(PLAN)
    shutil.rmtree(gate)
    with pytest.raises(StageError, match=r"report.json was removed; `kat run`"):
        table.last_report()


def test_rates_stand_with_their_intervals() -> None:
    lines = shown(table.pass_rates(report()))
    assert "Pass rate on held-out tasks (preset p[x], seed 3)" in lines
    assert "domain base SFT RL unified" in " ".join(lines).replace("┃", "").replace("  ", " ")
    row = "shell (n=40) 0.0 (0.0..50.0) 25.0 (12.5..62.5) 50.0 (25.0..75.0) 50.0 (25.0..75.0)"
    assert row in lines
    assert lines[lines.index(row) + 1] == "sampled (n=40) 12.5 12.5 12.5 12.5"


def test_checks_say_what_held_and_what_cannot_be_said() -> None:
    lines = shown(table.checks(report()))
    assert "Gate: NOT held" in lines
    assert "shell unified / RL 1.000 1.000 .. 1.000 >= 0.95 held" in lines
    assert f"swe unified / RL {DASH} {DASH} .. {DASH} >= 0.95 not held" in lines
    held = report() | {"gate": {"held": True, "checks": []}}
    assert "Gate: held" in shown(table.checks(held))


def test_it_is_said_where_to_look(home: Path) -> None:
    lines = table.where_to_look(report() | {"models": MODELS})
    assert lines[0] == "registered models: kat-shell v2, kat-swe v1, kat-unified v4"
    assert str(home / "report" / "index.html") in lines[1]
    assert all(str(home) in line for line in lines[1:])


def test_the_command_before_any_run_is_an_error(home: Path) -> None:
    for arguments in (["report"], ["report", "--json"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert f"error: no finished run in {home}" in result.output


def test_the_command_prints_both_tables_and_where_to_look(gate: Path, home: Path) -> None:
    table.remember(PLAN)
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 0, result.output
    for said in ("Pass rate on held-out tasks", "Gate: NOT held", f"{home}/report/index.html"):
        assert said in result.output


def test_a_home_with_brackets_is_printed_as_it_is(
    gate: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = home / "[bold]"
    monkeypatch.setenv("KATCORE_HOME", str(odd))
    assert f"no finished run in {odd};" in CliRunner().invoke(app, ["report"]).output
    shutil.copytree(home / "stages", odd / "stages")
    table.remember(PLAN)
    assert f"{odd}/report/index.html" in CliRunner().invoke(app, ["report"]).output


def test_the_command_s_json_is_what_is_documented(gate: Path) -> None:
    table.remember(PLAN)
    result = CliRunner().invoke(app, ["report", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert set(found) == {"preset", "seed", "domains", "gate", "models"}
    assert set(found["domains"]) == {"shell", "swe"}
    for name in found["domains"]:
        for column in ("base", "sft", "rl", "unified"):
            assert set(found["domains"][name][column]) == {"rate", "low", "high", "n"}
    assert found["gate"]["held"] is False
    assert found["gate"]["checks"][1]["value"] is None
    assert found["models"] == MODELS
