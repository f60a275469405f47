"""Monte-Carlo log-probability averaging (KAT-Coder-V2, equation 11), and what can be seen of the noise.

An engine's log-probability of a token is the policy's plus noise: sums in another order, other experts.
The mean of K passes over the same ids has rho + (1 - rho) / K of the variance, where rho is the share of it
that the passes have in common. The report averages logs; its origin averages probabilities, which for small
noise is larger by half the variance times 1 - 1/K. Proven in tests/train/test_mcla.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from katcore.train.surrogate import PerToken

Passes = Mapping[str, Sequence[Sequence[float]]]
"""By rollout id, K passes over the N trained tokens of its tree."""


def averaged(passes: Passes, mean: Literal["logs", "probabilities"] = "logs") -> PerToken:
    """The mean over the passes; of one pass, that pass to the bit."""
    return {name: _mean(_tensor(values), mean).tolist() for name, values in passes.items()}


def variance(passes: Passes) -> float:
    """What one pass varies about the mean of all, per token. Noise that all have in common is not in it."""
    return float(_joined(passes).var(0).mean())


def common_share(passes: Passes, sampled: PerToken) -> float:
    """An estimate of rho, from log-probabilities `sampled` whose noise is as large and has nothing in common.

    The mean square of `sampled` less the mean of the passes is (1 + rho) s + v / K, and v = (1 - rho) s is
    their variance. What sampling and prefill differ by in a regular way counts as common.
    """
    values_KN = _joined(passes)
    within = float(values_KN.var(0).mean())
    sampled_N = torch.cat([_tensor(sampled[name]) for name in passes])
    square = float(((sampled_N - values_KN.mean(0)) ** 2).mean())
    beyond = square - within / len(values_KN)
    total = beyond + within
    return (beyond - within) / total if total > 0 else 0.0


def noises(passes: Passes, num: int) -> list[PerToken]:
    """K draws of the noise in a mean of `num` passes: each pass less the mean of all, scaled to its variance.

    Noise that all passes have in common is not in it.
    """
    total = len(next(iter(passes.values())))
    scale = math.sqrt(total / (total - 1) / num)
    parts = {name: (rows := _tensor(values)) - rows.mean(0) for name, values in passes.items()}
    return [
        {name: (part_KN[k] * scale).tolist() for name, part_KN in parts.items()}
        for k in range(total)
    ]


def _mean(values_KN: Tensor, mean: Literal["logs", "probabilities"]) -> Tensor:
    if len(values_KN) == 1:
        return values_KN[0]
    if mean == "logs":
        return values_KN.mean(0)
    return values_KN.logsumexp(0) - math.log(len(values_KN))


def _joined(passes: Passes) -> Tensor:
    return torch.cat([_tensor(values) for values in passes.values()], dim=1)


def _tensor(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
