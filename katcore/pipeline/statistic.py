"""Intervals for pass rates: Wilson for one rate, bootstrap over tasks for paired differences and ratios."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

_NUM_RESAMPLES = 9999


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def pass_rate(passes: Sequence[bool]) -> Estimate:
    """The share of passes, with Wilson's interval."""
    result = stats.binomtest(sum(passes), len(passes))
    interval = result.proportion_ci(0.95, method="wilson")
    return Estimate(sum(passes) / len(passes), float(interval.low), float(interval.high))


def paired_difference(new: Sequence[float], old: Sequence[float]) -> Estimate:
    """mean(new - old) over the same tasks."""
    return _bootstrap(new, old, lambda a, b, axis: (a - b).mean(axis=axis))


def paired_ratio(new: Sequence[float], old: Sequence[float]) -> Estimate | None:
    """mean(new) / mean(old) over the same tasks; None where nothing old passed."""
    return _bootstrap(new, old, _ratio) if any(old) else None


def _ratio(a: Any, b: Any, axis: int) -> Any:
    # A resample in which nothing old passed says nothing; it counts as 0, against the lower bound.
    new, old = a.mean(axis=axis), b.mean(axis=axis)
    return np.divide(new, old, out=np.zeros_like(new), where=old > 0)


def _bootstrap(
    new: Sequence[float], old: Sequence[float], statistic: Callable[..., Any]
) -> Estimate:
    a, b = np.asarray(new, dtype=float), np.asarray(old, dtype=float)
    value = float(statistic(a, b, axis=0))
    if np.array_equal(a, b):
        return Estimate(value, value, value)
    interval = stats.bootstrap(
        (a, b),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=_NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
