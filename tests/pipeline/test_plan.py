"""Keys: equal work has equal keys, and whatever changes the work changes them downstream."""

from typing import Any

import pytest

from katcore.config import (
    DistillSettings,
    EvaluateSettings,
    LoraSettings,
    OptimizerSettings,
    Preset,
    RlSettings,
    SftSettings,
)
from katcore.errors import ConfigError, PluginError
from katcore.pipeline import plan
from katcore.pipeline.plan import build_plan
from katcore.plugin import Plugins

PRESET = Preset(name="p", summary="")


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.installed()


def changed(plugins: Plugins, **settings: Any) -> set[str]:
    """The stages of another preset whose keys are not the same."""
    one = build_plan(PRESET, plugins, experts=["terminal"])
    two = build_plan(PRESET.model_copy(update=settings), plugins, experts=["terminal"])
    return {name for name, key in one.keys.items() if two.keys[name] != key}


def test_the_same_settings_have_the_same_keys(plugins: Plugins) -> None:
    assert changed(plugins) == set()
    assert changed(plugins, name="q", summary="x", concurrency=3) == set()
    often = {"sft": SftSettings(checkpoint_every=3), "rl": RlSettings(checkpoint_every=3)}
    assert changed(plugins, **often, distill=DistillSettings(checkpoint_every=3)) == set()


def test_inputs_come_before_what_reads_them(plugins: Plugins) -> None:
    made = build_plan(PRESET, plugins)
    seen: set[str] = set()
    for name, spec in made.stages.items():
        assert seen.issuperset(spec.inputs)
        seen.add(name)


def test_with_the_best_teacher_experts_are_evaluated_on_all_domains_first(plugins: Plugins) -> None:
    best = PRESET.model_copy(update={"distill": DistillSettings(teacher="best")})
    made = build_plan(best, plugins, experts=["swe", "terminal"])
    assert "terminal.synthesize" in made.stages["swe.evaluate"].inputs
    assert {"swe.evaluate", "terminal.evaluate"} < set(made.stages["unified.distill"].inputs)
    seen: set[str] = set()
    for name, spec in made.stages.items():
        assert seen.issuperset(spec.inputs)
        seen.add(name)
    usual = build_plan(PRESET, plugins, experts=["swe", "terminal"])
    assert "terminal.synthesize" not in usual.stages["swe.evaluate"].inputs
    assert "swe.evaluate" not in usual.stages["unified.distill"].inputs


def test_a_setting_changes_its_stage_and_what_comes_after(plugins: Plugins) -> None:
    after_evaluate = {"terminal.register", "unified.gate", "unified.register"}
    evaluated = {"terminal.evaluate", "unified.evaluate"} | after_evaluate
    assert changed(plugins, evaluate=EvaluateSettings(tasks=3)) == evaluated
    trained = changed(plugins, rl=RlSettings(steps=1))
    assert {"terminal.rl", "unified.distill"} | evaluated == trained
    student = changed(plugins, student=SftSettings(steps=1))
    assert "unified.sft" in student
    assert not {name for name in student if name.startswith("terminal")}
    assert "terminal.rl" in changed(plugins, optimizer=OptimizerSettings(max_norm=0.5))
    balanced = changed(plugins, balance=0.01)
    assert {"terminal.sft", "terminal.rl", "unified.sft", "unified.distill"} <= balanced
    assert "terminal.collect" not in balanced
    assert changed(plugins, weighting="once") == balanced


def test_what_an_evaluation_samples_with_is_in_its_key(plugins: Plugins) -> None:
    stages = build_plan(PRESET, plugins, experts=["terminal"]).stages
    for name in ("terminal.evaluate", "unified.evaluate"):
        assert stages[name].config["serve"] == PRESET.serve.model_dump(mode="json")


def test_a_default_that_is_said_is_the_same_work(plugins: Plugins) -> None:
    """The learning rate of a key is the one that is trained with."""
    assert changed(plugins, rl=RlSettings(lr=1e-6), distill=DistillSettings(lr=5e-5)) == set()
    adapted = PRESET.model_copy(update={"lora": LoraSettings()})
    configs = build_plan(adapted, plugins, experts=["terminal"]).stages
    assert configs["terminal.rl"].config["rl"]["lr"] == 1e-5
    assert configs["unified.sft"].config["student"]["lr"] == 1e-4


def test_a_seed_is_another_run(plugins: Plugins) -> None:
    one, two = (build_plan(PRESET, plugins, experts=["terminal"], seed=seed) for seed in (0, 1))
    assert all(one.keys[name] != two.keys[name] for name in one.stages)


def test_code_changes_the_keys(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_plan(PRESET, plugins, experts=["terminal"])
    real = plan.code_hash
    monkeypatch.setattr(
        plan, "code_hash", lambda name: name if name == "kat_terminal" else real(name)
    )
    after = build_plan(PRESET, plugins, experts=["terminal"])
    assert before.keys["base"] == after.keys["base"]
    assert before.keys["terminal.synthesize"] != after.keys["terminal.synthesize"]
    assert before.keys["unified.gate"] != after.keys["unified.gate"]


def test_an_unknown_expert_lists_the_installed(plugins: Plugins) -> None:
    with pytest.raises(PluginError, match=r"no expert named 'none'; installed: .*terminal"):
        build_plan(PRESET, plugins, experts=["none"])


def test_no_expert_at_all_is_said() -> None:
    with pytest.raises(ConfigError, match="no expert is installed"):
        build_plan(PRESET, Plugins({}))
