"""A command that is given something wrong ends with 2 and says what would do."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from katcore.cli import app
from katcore.config import preset_names
from katcore.plugin import Plugins

_FRAME = re.compile(r"[│╭╮╰╯─\s]+")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))


def refused(*arguments: str | Path) -> str:
    """What is said. `gate` plans the whole run, and by itself could do nothing."""
    loaded = set(sys.modules)
    result = CliRunner().invoke(app, ["gate", *map(str, arguments)])
    assert result.exit_code == 2, f"{result.output}{result.exception!r}"
    assert "Traceback" not in result.output
    assert "torch" not in set(sys.modules) - loaded, "a mistake is said at once"
    return _FRAME.sub(" ", result.output)


def preset(folder: Path, content: str | bytes) -> Path:
    path = folder / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["huge", "huge.yaml", "[/bold]", "../nano"])
def test_an_unknown_preset_lists_the_shipped(name: str) -> None:
    said = refused("--preset", name)
    assert f"error: no preset named {name!r}; choose one of: {', '.join(preset_names())}" in said
    assert "or give the path of a YAML file" in said


def test_a_folder_is_no_preset(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").mkdir()
    assert "no preset named" in refused("--preset", tmp_path / "own.yaml")


def test_an_unknown_expert_lists_the_installed() -> None:
    installed = ", ".join(Plugins.installed().experts())
    said = refused("--experts", "terminal,cooking")
    assert f"error: no expert named 'cooking'; installed: {installed}" in said


def test_a_stage_of_an_expert_that_is_not_in_the_run_lists_the_stages() -> None:
    said = refused("--experts", "terminal", "--expert", "swe")
    assert "error: no stage 'swe.gate' in this run; it has: base, terminal.synthesize" in said


@pytest.mark.parametrize(
    "content",
    ["sft: {steps: 1", "a: b: c", "\tname: x", b"summary: \xff\xfe", "summary: '\x00'"],
)
def test_what_is_not_yaml_is_said_with_its_file(tmp_path: Path, content: str | bytes) -> None:
    path = preset(tmp_path, content)
    assert f"error: {path}: not valid YAML: " in refused("--preset", path)


@pytest.mark.parametrize("content", ["", "- sft", "just words"])
def test_what_is_no_mapping_is_said(tmp_path: Path, content: str) -> None:
    path = preset(tmp_path, content)
    assert f"error: {path}: expected a mapping of settings, found" in refused("--preset", path)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("summary: x\nspeed: 3", "speed: Extra inputs are not permitted"),
        ("summary: x\nrl: {step: 3}", "rl.step: Extra inputs are not permitted"),
        ("summary: x\nrl: {steps: many}", "rl.steps: Input should be a valid integer"),
        ("name: x", "summary: Field required"),
    ],
)
def test_a_key_or_value_that_does_not_fit_is_named(
    tmp_path: Path, content: str, wanted: str
) -> None:
    path = preset(tmp_path, content)
    assert f"error: {path}: {wanted}" in refused("--preset", path)


def test_all_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    said = refused("--preset", preset(tmp_path, "summary: x\nspeed: 3\nsft: {batch: big}"))
    assert "speed: " in said
    assert "sft.batch: " in said


@pytest.mark.parametrize(
    ("seed", "wanted"),
    [
        ("-1", "greater than or equal to 0"),
        (str(2**31), "less than or equal to 2147483647"),
        ("one", "a valid integer"),
        ("1.5", "a valid integer"),
    ],
)
def test_a_seed_is_a_whole_number_that_airflow_takes_too(seed: str, wanted: str) -> None:
    assert f"Invalid value for '--seed': Input should be {wanted}" in refused("--seed", seed)


def test_the_largest_seed_is_taken() -> None:
    said = refused("--experts", "terminal", "--seed", str(2**31 - 1))
    assert "unified.gate needs unified.evaluate, terminal.evaluate, not made yet" in said


def test_an_unknown_sandbox_lists_the_installed(tmp_path: Path) -> None:
    path = preset(tmp_path, "summary: x\nsandbox: nope")
    installed = ", ".join(Plugins.installed().names("sandbox"))
    assert f"error: no sandbox named 'nope'; installed: {installed}" in refused("--preset", path)


def test_settings_of_an_unknown_expert_are_refused(tmp_path: Path) -> None:
    path = preset(tmp_path, "summary: x\nsynthesis: {cooking: {train: 3}}")
    assert "error: no expert named 'cooking'; installed: " in refused("--preset", path)


def test_an_unknown_verb_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["cook"])
    assert result.exit_code == 2
    assert "No such command 'cook'" in _FRAME.sub(" ", result.output)
