"""`kat bench train`: tokens a second of a training step, beside TRL's trainers on the same rollouts.

Each row is a set of rollouts under one objective; in each round both sides take the same step, one after the
other, from the weights that the steps before left. Their losses are compared.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isclose
from pathlib import Path
from statistics import median
from typing import Any

from katcore.bench.aim import Aim
from katcore.bench.disk import machine
from katcore.bench.shapes import fork, tree, turns
from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.measure import VOCABULARY, Steps, as_tree, lines, model_settings
from katcore.train.rival import Side, grpo, sampled, sft

_NUM = 8
"""Rollouts that share nothing."""
_POR = 0.7


@dataclass(frozen=True, slots=True)
class Settings:
    """How many tokens a step's rollouts have without sharing, rounds, and the model."""

    tokens: int = 4096
    rounds: int = 5
    hidden: int = 384
    layers: int = 8

    @property
    def num_parts(self) -> int:
        """How many times a progress bar moves."""
        return len(_OBJECTIVES) * len(_ROLLOUTS)


@dataclass(frozen=True, slots=True)
class Row:
    """One objective on one set of rollouts.

    Tokens are those of all branches, without padding, for both. `sharing` is `tokens_flat` over
    `tokens_tree`. `apart` is the largest difference between two losses of one step.
    """

    objective: str
    rollouts: str
    tokens_flat: int
    tokens_tree: int
    ours_per_s: float
    trl_per_s: float
    ratio: float
    sharing: float
    flop_bound: float
    apart: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    machine: str
    model: str
    rows: list[Row]
    aims: list[Aim]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def equal(tokens: int) -> list[Sample]:
    """Sequences of one length."""
    return _sequences([tokens // _NUM] * _NUM)


def uneven(tokens: int) -> list[Sample]:
    """Sequences of a quarter to seven quarters of the mean length, as those of agents differ."""
    mean = tokens // _NUM
    return _sequences([mean // 4 + mean * 3 * at // 2 // (_NUM - 1) for at in range(_NUM)])


def answers(tokens: int) -> list[Sample]:
    """Two prompts with some answers to each, as one tree a prompt."""
    return [_tree(fork(tokens // 4, _POR), at) for at in range(2)]


def dropped(tokens: int) -> list[Sample]:
    """Two agents whose reasoning is dropped at each turn."""
    return [_tree(turns(tokens // 4, _POR), at) for at in range(2)]


_ROLLOUTS = {"equal": equal, "uneven": uneven, "answers": answers, "dropped reasoning": dropped}
_OBJECTIVES = {"sft": sft, "grpo": grpo}


def run(settings: Settings, step: Callable[[str], None]) -> Report:
    """Measure; `step` is told each part.

    Raises:
        StageError: the two sides have not the same losses.
    """
    model = model_settings(settings.hidden, settings.layers, settings.tokens)
    steps = Steps(model)
    rows = []
    for objective, take in _OBJECTIVES.items():
        for rollouts, make in _ROLLOUTS.items():
            step(f"{objective}, {rollouts}")
            trees = sampled(steps.model, make(settings.tokens))
            with tempfile.TemporaryDirectory() as folder:
                theirs, ours = take(steps.model, trees, settings.rounds, Path(folder))
            rows.append(_row(steps, f"{objective}, {rollouts}", trees, theirs, ours))
    size = sum(p.numel() for p in steps.model.parameters()) / 1e6
    return Report(machine() + ", one thread", f"{size:.1f} M parameters", rows, _aims(rows))


def _row(steps: Steps, name: str, trees: list[Sample], theirs: Side, ours: Side) -> Row:
    pairs = list(zip(theirs.losses, ours.losses, strict=True))
    if not all(isclose(one, other, rel_tol=1e-3, abs_tol=1e-3) for one, other in pairs):
        raise StageError(f"{name}: the losses of TRL's steps and of ours are not the same: {pairs}")
    branches = [line for tree in trees for line in lines(tree)]
    flat = sum(len(line.tokens) for line in branches)
    num = sum(len(tree.tokens) for tree in trees)
    ours_s, theirs_s = median(ours.seconds), median(theirs.seconds)
    flops = [sum(steps.flops(as_tree(one)) for one in many) for many in (branches, trees)]
    objective, rollouts = name.split(", ")
    return Row(
        objective,
        rollouts,
        flat,
        num,
        flat / ours_s,
        flat / theirs_s,
        theirs_s / ours_s,
        flat / num,
        flops[0] / flops[1],
        max(abs(one - other) for one, other in pairs),
    )


def _aims(rows: list[Row]) -> list[Aim]:
    alone = [row.ratio for row in rows if row.sharing == 1]
    shared = [row.ratio / row.sharing for row in rows if row.sharing > 1]
    return [
        Aim.at_least("speed beside TRL without sharing, in each row", min(alone), 1.0),
        Aim.at_least("speed beside TRL with sharing, over the sharing factor", min(shared), 1.0),
    ]


def _sequences(lengths: list[int]) -> list[Sample]:
    return [_tree(list(range(-1, length - 1)), at) for at, length in enumerate(lengths)]


def _tree(parents: list[int], number: int) -> Sample:
    """A rollout whose sampler was near the policy that is trained."""
    return replace(tree(parents, VOCABULARY, number), rollout_id=f"r{number}")
