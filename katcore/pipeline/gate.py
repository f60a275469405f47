"""Stage `gate`: the table of pass rates, and whether specializing and unifying worked.

Greedy pass rates on the same held-out tasks decide. Every domain has to hold: SFT beats the base, RL beats
SFT (paired interval above 0), and the unified model keeps what its expert can do (paired ratio).
"""

import json
from pathlib import Path
from typing import Any

from katcore.errors import StageError
from katcore.pipeline.plan import MODES, UNIFIED
from katcore.pipeline.stage import Job
from katcore.pipeline.statistic import Estimate, paired_difference, paired_ratio, pass_rate
from katcore.schema.codec import read_lines
from katcore.schema.rollout import Rollout

COLUMNS = ("base", "sft", "rl", "unified")
Passes = dict[str, float]
"""1.0 or 0.0 by task id; a part of a reward is no pass."""

_MIN_TASKS = 2


def run(job: Job) -> dict[str, float]:
    """Write `report.json`."""
    names = [name.removesuffix(".evaluate") for name in job.inputs]
    names.remove(UNIFIED)
    domains: dict[str, Any] = {}
    checks: list[dict[str, Any]] = []
    for name in names:
        passes = {mode: _passes(job, name, mode) for mode in MODES}
        domains[name] = {column: _rate(passes["greedy"][column]) for column in COLUMNS} | {
            "sampled": {column: _rate(passes["sampled"][column]) for column in COLUMNS}
        }
        checks += _checks(job, name, passes["greedy"])
    held = all(check["held"] for check in checks)
    report = {
        "preset": job.preset.name,
        "seed": job.seed,
        "domains": domains,
        "gate": {"held": held, "checks": checks},
    }
    (job.out / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False))
    rates = {
        f"pass_rate/{name}/{column}": domains[name][column]["rate"]
        for name in names
        for column in COLUMNS
    }
    job.progress.step(0, 1, rates | {"gate_held": float(held)})
    return rates | {"held": float(held)}


def number(value: float | None) -> str:
    """A number of the report, or a dash where it is undefined."""
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def _passes(job: Job, name: str, mode: str) -> dict[str, Passes]:
    def read(folder: Path, column: str) -> Passes:
        rollouts = read_lines(Rollout, folder / f"{column}.{mode}.{name}.jsonl")
        scored = (item for item in rollouts if item.reward is not None)
        return {item.task_id: float(item.reward == 1.0) for item in scored}

    own, unified = job.input(f"{name}.evaluate"), job.input(f"{UNIFIED}.evaluate")
    found = {column: read(unified if column == "unified" else own, column) for column in COLUMNS}
    scored = set.intersection(*(set(passes) for passes in found.values()))
    if len(scored) < _MIN_TASKS:
        counts = ", ".join(f"{column} {len(passes)}" for column, passes in found.items())
        raise StageError(
            f"{name}: {len(scored)} held-out tasks were scored ({mode}) for every model, at least"
            f" {_MIN_TASKS} are needed; scored: {counts}; the outcomes of the others are in {own}"
            f" and {unified}"
        )
    return {
        column: {task: passes[task] for task in sorted(scored)} for column, passes in found.items()
    }


def _rate(passes: Passes) -> dict[str, float]:
    estimate = pass_rate([passed == 1.0 for passed in passes.values()])
    return {"rate": estimate.value, "low": estimate.low, "high": estimate.high, "n": len(passes)}


def _checks(job: Job, name: str, passes: dict[str, Passes]) -> list[dict[str, Any]]:
    settings = job.preset.evaluate
    base, sft, rl, unified = (list(passes[column].values()) for column in COLUMNS)
    gain, more, kept = (
        paired_difference(sft, base),
        paired_difference(rl, sft),
        paired_ratio(unified, rl),
    )
    return [
        _check(name, "SFT - base", gain, "lower bound > 0", is_held=gain.low > 0),
        _check(name, "RL - SFT", more, "lower bound > 0", is_held=more.low > 0),
        _check(
            name,
            "unified / RL",
            kept,
            f">= {settings.retention:g}, lower bound >= {settings.retention_lower:g}",
            is_held=kept is not None
            and kept.value >= settings.retention
            and kept.low >= settings.retention_lower,
        ),
    ]


def _check(
    name: str, what: str, found: Estimate | None, wanted: str, *, is_held: bool
) -> dict[str, Any]:
    return {
        "domain": name,
        "what": what,
        "value": found.value if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "wanted": wanted,
        "held": bool(is_held),
    }
