"""Presets: what differs for one expert."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from katcore.config import (
    DistillSettings,
    LoraSettings,
    MclaSettings,
    RlSettings,
    SftSettings,
    learning_rate,
    load_preset,
)
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


@pytest.mark.parametrize(
    ("level", "clip"),
    [
        ("token", (0.2, 0.28)),
        ("turn", (0.2, 0.28)),
        ("turn-geometric", (3e-4, 4e-4)),
        ("sequence", (3e-4, 4e-4)),
    ],
)
def test_means_of_ratios_are_clipped_closer_than_ratios(
    tmp_path: Path, level: str, clip: Any
) -> None:
    found = RlSettings.model_validate({"level": level})
    assert (found.clip_low, found.clip_high) == clip
    said = RlSettings.model_validate({"level": level, "clip_low": 0.5})
    assert (said.clip_low, said.clip_high) == (0.5, clip[1])
    own = (
        load_preset(str(preset(tmp_path, f"{{swe: {{rl: {{level: {level}}}}}}}")))
        .for_expert("swe")
        .rl
    )
    assert (own.clip_low, own.clip_high) == clip, "what follows from an expert's level follows anew"


def test_each_correction_has_its_range() -> None:
    assert RlSettings(correction="icepop").correction_range == (0.5, 5.0)
    assert RlSettings(correction="truncate", old="trainer").correction_range == (0.5, 2.0)
    assert RlSettings(correction="icepop", correction_range=(0.9, 1.1)).correction_range == (
        0.9,
        1.1,
    )


def test_a_distillation_has_rewards_and_groups_where_its_objective_has_advantages() -> None:
    def parts(**given: Any) -> tuple[str, bool, int]:
        found = DistillSettings(**given)
        return found.objective, found.rewards, found.group

    assert parts() == ("policy-gradient", True, 8)
    assert parts(objective="reverse-kl") == ("reverse-kl", False, 1)
    assert parts(rewards=False) == ("policy-gradient", False, 1)
    assert parts(group=4) == ("policy-gradient", True, 4)
    with pytest.raises(ValidationError, match="or rewards: false"):
        parts(group=1)


def test_adapters_take_larger_learning_rates() -> None:
    kinds = (SftSettings, RlSettings, DistillSettings)
    assert [learning_rate(kind(), None) for kind in kinds] == [1e-5, 1e-6, 5e-5]
    assert [learning_rate(kind(), LoraSettings()) for kind in kinds] == [1e-4, 1e-5, 1e-4]
    assert [learning_rate(kind(lr=0.5), LoraSettings()) for kind in kinds] == [0.5] * 3


def test_routers_that_are_not_trained_cannot_be_balanced(tmp_path: Path) -> None:
    path = preset(tmp_path, "{}")
    text = path.read_text()
    path.write_text(f"{text}balance: 0.001\nlora: {{}}\n")
    with pytest.raises(
        ConfigError, match=r"p\.yaml: balance is for routers that learn, .* set balance: 0"
    ):
        load_preset(str(path))
