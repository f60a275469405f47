"""Stage `gate`: the table of pass rates, and whether specializing and unifying worked.

Greedy pass rates on the same held-out tasks decide. Every domain has to hold: SFT beats the base, RL beats
SFT (paired interval above 0), and the unified model keeps what its expert can do (paired ratio).
"""

import json
from pathlib import Path
from typing import Any

from katcore.pipeline.evaluate import MODES
from katcore.pipeline.plan import UNIFIED
from katcore.pipeline.stage import Job
from katcore.pipeline.statistic import Estimate, paired_difference, paired_ratio, pass_rate
from katcore.schema.codec import read_lines
from katcore.schema.rollout import Rollout

COLUMNS = ("base", "sft", "rl", "unified")
Rewards = dict[str, float]
"""Reward by task id."""


def run(job: Job) -> dict[str, float]:
    """Write `report.json`."""
    names = [name.removesuffix(".evaluate") for name in job.inputs]
    names.remove(UNIFIED)
    domains: dict[str, Any] = {}
    checks: list[dict[str, Any]] = []
    for name in names:
        rewards = {mode: _rewards(job, name, mode) for mode in MODES}
        domains[name] = {column: _rate(rewards["greedy"][column]) for column in COLUMNS} | {
            "sampled": {column: _rate(rewards["sampled"][column]) for column in COLUMNS}
        }
        checks += _checks(job, name, rewards["greedy"])
    held = all(check["held"] for check in checks)
    report = {
        "preset": job.preset.name,
        "seed": job.seed,
        "domains": domains,
        "gate": {"held": held, "checks": checks},
    }
    (job.out / "report.json").write_text(json.dumps(report, indent=1))
    rates = {
        f"pass_rate/{name}/{column}": domains[name][column]["rate"]
        for name in names
        for column in COLUMNS
    }
    job.progress.step(0, 1, rates | {"gate_held": float(held)})
    return rates | {"held": float(held)}


def _rewards(job: Job, name: str, mode: str) -> dict[str, Rewards]:
    def read(folder: Path, column: str) -> Rewards:
        rollouts = read_lines(Rollout, folder / f"{column}.{mode}.{name}.jsonl")
        return {item.task_id: item.reward for item in rollouts if item.reward is not None}

    own, unified = job.input(f"{name}.evaluate"), job.input(f"{UNIFIED}.evaluate")
    found = {column: read(unified if column == "unified" else own, column) for column in COLUMNS}
    scored = set.intersection(*(set(rewards) for rewards in found.values()))
    return {
        column: {task: rewards[task] for task in sorted(scored)}
        for column, rewards in found.items()
    }


def _rate(rewards: Rewards) -> dict[str, float]:
    estimate = pass_rate([reward == 1.0 for reward in rewards.values()])
    return {
        "rate": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "n": len(rewards),
    }


def _checks(job: Job, name: str, rewards: dict[str, Rewards]) -> list[dict[str, Any]]:
    settings = job.preset.evaluate
    base, sft, rl, unified = (list(rewards[column].values()) for column in COLUMNS)
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
            is_held=any(rl)
            and kept.value >= settings.retention
            and kept.low >= settings.retention_lower,
        ),
    ]


def _check(name: str, what: str, found: Estimate, wanted: str, *, is_held: bool) -> dict[str, Any]:
    return {
        "domain": name,
        "what": what,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "wanted": wanted,
        "held": bool(is_held),
    }
