"""Presets: what differs for one expert."""

from pathlib import Path

import pytest

from katcore.config import MclaSettings, load_preset
from katcore.errors import ConfigError


def preset(folder: Path, text: str) -> Path:
    path = folder / "p.yaml"
    path.write_text(f"summary: x\nsft: {{steps: 7, batch: 3}}\nexperts: {text}\n")
    return path


def test_an_expert_gets_what_differs_and_the_rest_is_the_presets(tmp_path: Path) -> None:
    found = load_preset(str(preset(tmp_path, "{swe: {sft: {steps: 9}, rl: {group: 2}}}")))
    swe, other = found.for_expert("swe"), found.for_expert("terminal")
    assert (swe.sft.steps, swe.sft.batch, swe.rl.group) == (9, 3, 2)
    assert (other.sft, other.rl) == (found.sft, found.rl)
    assert swe.for_expert("swe") == swe


def test_experts_have_shares_of_the_distillation(tmp_path: Path) -> None:
    found = load_preset(str(preset(tmp_path, "{swe: {distill: {prompts: 9, cold_batch: 5}}}")))
    swe, other = found.for_expert("swe").distill, found.for_expert("terminal").distill
    assert (swe.prompts, swe.cold_batch, swe.steps) == (9, 5, other.steps)
    assert other == found.distill


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{swe: {sft: {stepz: 9}}}", "stepz"),
        ("{swe: {evaluate: {tasks: 9}}}", "'collect', 'sft', 'rl' or 'distill'"),
        (
            "{swe: {distill: {steps: 9}}}",
            "swe.distill: steps cannot differ .* cold_batch and prompts",
        ),
        ("{swe: {sft: {steps: many}}}", "steps"),
    ],
)
def test_what_fits_no_section_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_preset(str(preset(tmp_path, text)))


def test_mcla_has_defaults(tmp_path: Path) -> None:
    found = load_preset(str(preset(tmp_path, "{swe: {rl: {mcla: {}}}}")))
    assert found.rl.mcla is None
    assert found.for_expert("swe").rl.mcla == MclaSettings(passes=8, place="engine", mean="logs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{mcla: {passes: 0}}", "greater than or equal to 1"),
        ("{mcla: {place: trainer}}", "nothing uses them: set old: trainer"),
        ("{correction: truncate}", "in it already: set old: trainer"),
        ("{mcla: {}, correction: truncate}", "in it already: set old: trainer"),
    ],
)
def test_what_would_mean_nothing_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_preset(str(preset(tmp_path, f"{{swe: {{rl: {text}}}}}")))


@pytest.mark.parametrize(
    "where", ["rl: {level: sequence}", "experts: {swe: {rl: {level: sequence}}}"]
)
def test_whole_branches_cannot_count_once(tmp_path: Path, where: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"summary: x\nweighting: once\n{where}\n")
    with pytest.raises(ConfigError, match="set weighting: path, or another level"):
        load_preset(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "{correction: icepop}",
        "{mcla: {}, correction: icepop}",
        "{mcla: {}, correction: truncate, old: trainer}",
        "{mcla: {place: trainer}, correction: icepop}",
    ],
)
def test_averaging_composes_with_corrections(tmp_path: Path, text: str) -> None:
    load_preset(str(preset(tmp_path, f"{{swe: {{rl: {text}}}}}")))
