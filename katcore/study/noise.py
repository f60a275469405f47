"""How much noise a mean of K passes has left, and how many turns it clips, where the truth is known."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from katcore.schema.sample import Sample
from katcore.train.mcla import Passes, averaged, common_share, noises, variance
from katcore.train.surrogate import PerToken, PolicyGradient

COUNTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Left:
    """The mean of `passes` against the truth.

    `mean_square` is the error's, per token; `theory` what rho + (1 - rho) / K makes of one pass's. `clipped`
    is the share of turns that the error alone puts outside of the clip range; `estimated` the same as far
    as the passes show it, without the truth.
    """

    passes: int
    mean_square: float
    theory: float
    clipped: float
    estimated: float


@dataclass(frozen=True, slots=True)
class Noise:
    """One source of noise. `common` is rho by the truth, `common_estimated` by the sampler's own draws.

    `sampled_gap` and `gap` are mean absolute differences from the truth of the sampler's draws and of one
    pass; `sampled_bias` is the mean difference of its draws.
    """

    name: str
    variance: float
    common: float
    common_estimated: float
    sampled_gap: float
    sampled_bias: float
    gap: float
    rows: list[Left]


def measured(
    name: str,
    samples: Sequence[Sample],
    passes: Passes,
    truth: PerToken,
    objective: PolicyGradient,
) -> Noise:
    """What `passes`, 16 of each sample, say beside `truth`."""
    values_all = np.concatenate([np.array(passes[one.rollout_id]) for one in samples], axis=1)
    truth_all = np.concatenate([np.array(truth[one.rollout_id]) for one in samples])
    sampled = {
        one.rollout_id: [v for v, yes in zip(one.logprobs, one.trained, strict=True) if yes]
        for one in samples
    }
    apart_all = np.concatenate([np.array(sampled[one.rollout_id]) for one in samples]) - truth_all
    whole = float(((values_all - truth_all) ** 2).mean())
    own = variance(passes)
    common = 1 - own / whole if whole else 0.0
    rows = []
    for num in COUNTS:
        errors = [_error(part, truth) for part in _groups(passes, num)]
        squares = [value**2 for error in errors for row in error.values() for value in row]
        rows.append(
            Left(
                num,
                fmean(squares),
                whole * (common + (1 - common) / num),
                objective.outside(errors, samples),
                objective.outside(noises(passes, num), samples),
            )
        )
    return Noise(
        name,
        own,
        common,
        common_share(passes, sampled),
        float(np.abs(apart_all).mean()),
        float(apart_all.mean()),
        float(np.abs(values_all - truth_all).mean()),
        rows,
    )


def injected(truth: PerToken, sigma: float, rho: float, seed: int) -> Passes:
    """16 passes: the truth and normal noise of deviation `sigma`, the share `rho` of it in common."""
    draw = random.Random(seed).gauss
    passes: dict[str, list[list[float]]] = {}
    for name, values in truth.items():
        common = [math.sqrt(rho) * sigma * draw(0, 1) for _ in values]
        own = math.sqrt(1 - rho) * sigma
        passes[name] = [
            [value + both + own * draw(0, 1) for value, both in zip(values, common, strict=True)]
            for _ in range(COUNTS[-1])
        ]
    return passes


def drawn_with(samples: Sequence[Sample], sigma: float, seed: int) -> list[Sample]:
    """As if the sampler's own log-probabilities had normal noise of deviation `sigma`, too."""
    draw = random.Random(seed).gauss
    return [
        replace(
            one,
            logprobs=tuple(
                value + sigma * draw(0, 1) if yes else value
                for value, yes in zip(one.logprobs, one.trained, strict=True)
            ),
        )
        for one in samples
    ]


def _groups(passes: Passes, num: int) -> list[PerToken]:
    """Means of `num` passes each, as many as there are."""
    total = len(next(iter(passes.values())))
    return [
        averaged({name: rows[start : start + num] for name, rows in passes.items()})
        for start in range(0, total, num)
    ]


def _error(values: PerToken, truth: PerToken) -> PerToken:
    return {
        name: [one - other for one, other in zip(values[name], row, strict=True)]
        for name, row in truth.items()
    }
