"""The gate on made-up evaluations: what counts, where the borders are, and what cannot be judged."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from katcore.config import EvaluateSettings, Preset
from katcore.errors import StageError
from katcore.pipeline import gate
from katcore.pipeline.gate import COLUMNS
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.progress import Progress
from katcore.pipeline.stage import Job
from katcore.pipeline.statistic import paired_ratio, pass_rate
from katcore.plugin import Plugins
from katcore.schema.codec import write_lines
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Verdict

Rewards = Sequence[float | None]
INPUTS = ("unified.evaluate", "shell.evaluate", "swe.evaluate")
SPEC = StageSpec("unified.gate", "gate", inputs=INPUTS)
ALL, NONE = [1.0] * 20, [0.0] * 20
CLIMB: Mapping[str, Rewards] = {
    "base": NONE,
    "sft": [1.0] * 8 + [0.0] * 12,
    "rl": [1.0] * 16 + [0.0] * 4,
    "unified": [1.0] * 16 + [0.0] * 4,
}
"""An expert that holds."""


def passes(num: int, of: int) -> list[float]:
    return [1.0] * num + [0.0] * (of - num)


def rollouts(rewards: Rewards) -> list[Rollout]:
    return [
        Rollout(
            f"r{number}",
            f"t{number}",
            "d",
            "g",
            0,
            Outcome.SANDBOX_FAILED if reward is None else Outcome.SCORED,
            Trajectory(f"r{number}", ()),
            Verdict(reward),
        )
        for number, reward in enumerate(rewards)
    ]


class Untracked(Progress):
    """Sends nothing to MLflow, however slow the machine is."""

    def _track(self) -> None:
        self._pending = []


class Bench:
    """A gate stage, and the evaluations it reads."""

    def __init__(self, root: Path, **settings: float) -> None:
        self.inputs = {name: root / name for name in INPUTS}
        self.work = root / "work"
        for folder in (*self.inputs.values(), self.work / "out"):
            folder.mkdir(parents=True)
        evaluate = EvaluateSettings.model_validate(settings)
        self.preset = Preset(name="p", summary="", evaluate=evaluate)
        self.evaluate("swe", CLIMB)
        self.evaluate("shell", CLIMB)

    def evaluate(self, name: str, rewards: Mapping[str, Rewards], mode: str = "") -> None:
        """Write what `rewards` has by column, in one mode or in both."""
        for column, given in rewards.items():
            folder = self.inputs["unified.evaluate" if column == "unified" else f"{name}.evaluate"]
            for kind in [mode] if mode else ["greedy", "sampled"]:
                write_lines(folder / f"{column}.{kind}.{name}.jsonl", rollouts(given))

    def run(self) -> dict[str, Any]:
        """The report; it has to be JSON to the letter."""
        plan = Plan(self.preset, 7, ("shell", "swe"), {SPEC.id: SPEC}, {SPEC.id: "k"})
        progress = Untracked(SPEC, self.work, plan)
        out = self.work / "out"
        job = Job(SPEC, self.preset, 7, Plugins({}), self.inputs, self.work, out, progress)
        self.metrics = gate.run(job)
        report: dict[str, Any] = json.loads(
            (out / "report.json").read_text(), parse_constant=pytest.fail
        )
        return report

    def check(self, name: str, what: str) -> dict[str, Any]:
        """One check of the report."""
        checks = self.run()["gate"]["checks"]
        (found,) = [item for item in checks if (item["domain"], item["what"]) == (name, what)]
        assert isinstance(found, dict)
        return found


def test_rates_have_wilson_s_intervals(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.evaluate("swe", {"sft": passes(5, 20)}, "sampled")
    report = bench.run()
    wanted = pass_rate([True] * 8 + [False] * 12)
    assert report["domains"]["swe"]["sft"] == {
        "rate": 0.4,
        "low": wanted.low,
        "high": wanted.high,
        "n": 20,
    }
    assert report["domains"]["swe"]["sampled"]["sft"]["rate"] == 0.25
    assert report["domains"]["shell"]["sampled"]["sft"]["rate"] == 0.4
    assert (report["preset"], report["seed"]) == ("p", 7)


def test_every_check_of_every_domain_has_to_hold(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    report = bench.run()
    assert [(item["domain"], item["what"]) for item in report["gate"]["checks"]] == [
        (name, what)
        for name in ("shell", "swe")
        for what in ("SFT - base", "RL - SFT", "unified / RL")
    ]
    assert all(item["held"] for item in report["gate"]["checks"])
    assert report["gate"]["held"] is True
    assert bench.metrics["held"] == 1.0
    assert bench.metrics["pass_rate/swe/rl"] == 0.8
    bench.evaluate("shell", {"unified": NONE})
    report = bench.run()
    failed = [(c["domain"], c["what"]) for c in report["gate"]["checks"] if not c["held"]]
    assert failed == [("shell", "unified / RL")]
    assert report["gate"]["held"] is False
    assert bench.metrics["held"] == 0.0


def test_only_tasks_that_every_model_was_scored_on_count(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.evaluate("swe", {"base": [None, None, *NONE[2:]], "unified": ALL[:10]}, "greedy")
    domain = bench.run()["domains"]["swe"]
    assert {column: domain[column]["n"] for column in COLUMNS} == dict.fromkeys(COLUMNS, 8)
    assert domain["sft"]["rate"] == 6 / 8, "its first two passes have no partner"
    assert domain["sampled"]["sft"] == {**domain["sampled"]["sft"], "n": 20, "rate": 0.4}


def test_the_sampled_rates_decide_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.evaluate("swe", dict.fromkeys(COLUMNS, NONE), "sampled")
    assert bench.run()["gate"]["held"]


def test_a_part_of_a_reward_is_no_pass(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.evaluate("swe", {"base": NONE, "sft": [0.9] * 20})
    check = bench.check("swe", "SFT - base")
    assert (check["value"], check["held"]) == (0.0, False)


@pytest.mark.parametrize(
    ("num", "is_held"),
    [
        # A bootstrap of 100 tasks misses all 3 gains in 5 of 100 resamples: the bound is 0 itself.
        (0, False),
        (3, False),
        (6, True),
    ],
)
@pytest.mark.parametrize(("what", "better"), [("SFT - base", "sft"), ("RL - SFT", "rl")])
def test_a_gain_needs_a_bound_above_nothing(
    tmp_path: Path, num: int, what: str, better: str, *, is_held: bool
) -> None:
    bench = Bench(tmp_path)
    before = dict.fromkeys(COLUMNS, passes(10, 100))
    bench.evaluate("swe", before | {better: passes(10 + num, 100)})
    check = bench.check("swe", what)
    assert check["value"] == pytest.approx(num / 100)
    assert (check["low"] > 0) is is_held
    assert check["low"] >= 0
    assert check["held"] is is_held


@pytest.mark.parametrize(("retention", "is_held"), [(0.95, True), (0.9501, False)])
def test_what_is_kept_may_be_as_little_as_wanted(
    tmp_path: Path, retention: float, *, is_held: bool
) -> None:
    bench = Bench(tmp_path, retention=retention, retention_lower=0.5)
    bench.evaluate("swe", {"rl": ALL, "unified": passes(19, 20)})
    check = bench.check("swe", "unified / RL")
    assert (check["value"], check["held"]) == (0.95, is_held)
    assert check["wanted"] == f">= {retention:g}, lower bound >= 0.5"


def test_the_lower_bound_of_what_is_kept_has_its_own_border(tmp_path: Path) -> None:
    rl, unified = ALL, passes(19, 20)
    found = paired_ratio(unified, rl)
    assert found
    for number, lowest in enumerate((found.low, math.nextafter(found.low, 1.0))):
        bench = Bench(tmp_path / str(number), retention=0.0, retention_lower=lowest)
        bench.evaluate("swe", {"rl": rl, "unified": unified})
        assert bench.check("swe", "unified / RL")["held"] is (number == 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unified", [NONE, ALL], ids=["none", "all"])
def test_of_an_expert_that_passes_nothing_nothing_is_kept(
    tmp_path: Path, unified: list[float]
) -> None:
    bench = Bench(tmp_path)
    bench.evaluate("swe", {"rl": NONE, "unified": unified})
    check = bench.check("swe", "unified / RL")
    assert (check["value"], check["low"], check["high"]) == (None, None, None)
    assert check["held"] is False


@pytest.mark.filterwarnings("error")
def test_an_expert_that_passes_one_task_gives_numbers(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.evaluate("swe", {"rl": passes(1, 20), "unified": passes(2, 20)})
    check = bench.check("swe", "unified / RL")
    assert (check["value"], check["low"], check["held"]) == (2.0, 0.0, False)
    assert math.isfinite(check["high"])


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("scored", [[], [1.0]], ids=["none", "one"])
def test_without_tasks_scored_for_all_nothing_is_judged(
    tmp_path: Path, column: str, mode: str, scored: list[float]
) -> None:
    bench = Bench(tmp_path)
    bench.evaluate("swe", {column: [*scored, *[None] * (20 - len(scored))]}, mode)
    with pytest.raises(StageError) as caught:
        bench.run()
    said = str(caught.value)
    assert f"swe: {len(scored)} held-out tasks were scored ({mode}) for every model" in said
    assert f"{column} {len(scored)}" in said
    assert str(bench.inputs["swe.evaluate"]) in said
