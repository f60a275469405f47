"""The clipped surrogate of reinforcement learning, over tokens, turns or whole branches.

- level `turn`: the ratio of a turn is the product over its tokens, as KAT-Coder-V2 prints it (section 3.3.2);
  `turn-geometric` takes its root, so that a long turn is not clipped for its length alone;
- level `token`: PPO's ratio per token (GRPO, arXiv 2402.03300), with a wider upper range (DAPO, 2503.14476);
- level `sequence`: one ratio per branch, the geometric mean over its tokens (GSPO, arXiv 2507.18071).

Departs from the report in what it leaves open: the advantage is normalised in the group of a task, and a
turn of several branches follows the note in `units`. Proven in tests/train/test_surrogate.py: a tree is the
sum of its branches, written-out loops, TRL's own GRPO and GSPO losses, finite differences.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train import head, ranks
from katcore.train.batch import TreeBatch, Weighting
from katcore.train.frozen import hidden_at
from katcore.train.objective import (
    FAR,
    Loss,
    Metrics,
    Objective,
    Terms,
    refuse_unsampled,
    token_logprobs,
)
from katcore.train.units import Level, Mean, Rows, Units, units

PerToken = Mapping[str, Sequence[float]]
"""By rollout id, one number for each trained token of its tree."""


@dataclass(frozen=True, slots=True)
class Correction:
    """What is done about a sampler that is not quite the policy it samples for, k = pi_trainer / pi_sampler.

    `icepop` leaves out tokens whose k is not in [low, high] (also out of the product of their turn);
    `truncate` leaves out none. Then a unit is weighed by its k, at most `high` (truncated importance
    sampling; inside the range, IcePop's own weight), if it `weighs`: ratios that start from the sampler
    have k in them already.
    """

    kind: Literal["icepop", "truncate"]
    low: float = 0.5
    high: float = 5.0
    weighs: bool = True


@dataclass(frozen=True, slots=True)
class Clipped:
    """Shape of the surrogate. `clip_high` is above 1, `clip_low` below; `temperature` is the sampler's.

    Per token, `entropy` weighs a bonus for it, and `kl` a cost, the k3 estimate of KL(policy || reference).
    `imitation` weighs the negative log-likelihood of answers that did not fail, in rollouts that passed
    (VAPO, arXiv 2504.05118, section 4.3).
    """

    level: Level = "token"
    mean: Mean = "unit"
    clip_low: float = 0.2
    clip_high: float = 0.28
    temperature: float = 1.0
    kl: float = 0.0
    entropy: float = 0.0
    imitation: float = 0.0
    correction: Correction | None = None


class PolicyGradient(Objective):
    """The surrogate as an objective; counts what it clips until it is asked.

    `advantages` are by rollout id. `old` are the old policy's log-probabilities where they are not the
    sampler's own (recomputed, or the mean of several prefills). `apart` is the log k that a correction goes
    by; `old` less the sampler's where it is not given. `reference(batch, samples)` gives the reference
    policy's log-probabilities, (N,).
    """

    def __init__(
        self,
        advantages: Mapping[str, Rows],
        shape: Clipped = Clipped(),
        *,
        old: PerToken | None = None,
        apart: PerToken | None = None,
        reference: Callable[[TreeBatch, Sequence[Sample]], Tensor] | None = None,
    ) -> None:
        if shape.kl and reference is None:
            raise ValueError("a KL term needs a reference policy")
        self._advantages = advantages
        self._shape = shape
        self._old = old
        self._apart = apart
        self._reference = reference
        self._made: dict[tuple[str, Weighting], Units] = {}
        self._sums: defaultdict[str, float] = defaultdict(float)

    def on(self, batch: TreeBatch, samples: Sequence[Sample]) -> Loss:
        """-sum over units of plus min(r, 1 + high) + minus max(r, 1 - low), and the terms per token."""
        refuse_unsampled(samples)

        def terms(logits_MV: Tensor, chosen_M: Tensor) -> Terms:
            return self._terms(logits_MV, batch.targets_N[chosen_M])

        return Loss(terms, lambda terms: self._total(terms, batch, samples))

    def weight(self, samples: Sequence[Sample], weighting: Weighting) -> float:
        """See `Objective.weight`."""
        return sum(self._units(sample, weighting).weight for sample in samples)

    def _terms(self, logits_MV: Tensor, targets_M: Tensor) -> Terms:
        heat = self._shape.temperature
        found = {"logprob": token_logprobs(logits_MV, targets_M, heat)}
        if self._shape.entropy:
            scaled_MV = (logits_MV / heat).log_softmax(1)
            found["entropy"] = -(scaled_MV.exp() * scaled_MV).sum(1)
        return found

    def _total(self, terms: Terms, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        shape = self._shape
        trees = [self._units(sample, batch.weighting) for sample in samples]
        joined = _Joined(trees, is_mean=shape.level != "turn")
        logprob_N = terms["logprob"]
        old_N = batch.old_N if self._old is None else _in_order(self._old, samples)
        apart_N = old_N - batch.old_N if self._apart is None else _in_order(self._apart, samples)
        weight_U, keep_N = self._corrected(apart_N, joined)
        ratio_U = joined.ratios(logprob_N - old_N, keep_N)
        gain_U = joined.plus_U * ratio_U.clamp(max=1 + shape.clip_high)
        gain_U = gain_U + joined.minus_U * ratio_U.clamp(min=1 - shape.clip_low)
        self._count(joined, ratio_U.detach(), keep_N)
        self._sums["kl_old"] += float(_k3((logprob_N - old_N).detach()).sum())
        loss = -(weight_U * gain_U).sum()
        if shape.kl or shape.entropy or shape.imitation:
            each_N = _float64(value for tree in trees for value in tree.each)
            loss = loss + (each_N * self._costs(terms, batch, samples)).sum()
        return loss

    def rates(self) -> Metrics:
        """The share of units that the clip held back since the last time, and of tokens left out.

        `kl_old` is the mean over tokens of the k3 estimate of KL(old policy || policy); `kl`, where there is
        a term for it, that of KL(policy || reference).
        """
        sums = defaultdict(float, ranks.totals(self._sums))
        num_tokens = max(1, sums["tokens"])
        found = {
            "clip_rate": sums["clipped"] / max(1, sums["units"]),
            "dropped_rate": sums["dropped"] / num_tokens,
            "kl_old": sums["kl_old"] / num_tokens,
        }
        if self._shape.kl:
            found["kl"] = sums["kl"] / num_tokens
        self._sums.clear()
        return found

    def outside(self, draws: Sequence[PerToken], samples: Sequence[Sample]) -> float:
        """The share of units that log-ratios put outside of the clip range, the mean over several draws."""
        # What units there are does not depend on how they are weighed.
        trees = [self._units(sample, "path") for sample in samples]
        joined = _Joined(trees, is_mean=self._shape.level != "turn")
        low, high = 1 - self._shape.clip_low, 1 + self._shape.clip_high
        shares = []
        for draw in draws:
            apart_N = _in_order(draw, samples)
            ratio_U = joined.ratios(apart_N, torch.ones_like(apart_N, dtype=torch.bool))
            shares.append(float(((ratio_U < low) | (ratio_U > high)).double().mean()))
        return fmean(shares)

    def _units(self, sample: Sample, weighting: Weighting) -> Units:
        """Those of a rollout, made once: a step goes over its rollouts several times."""
        key = (sample.rollout_id, weighting)
        if key not in self._made:
            shape, rows = self._shape, self._advantages[sample.rollout_id]
            self._made[key] = units(
                sample, rows, level=shape.level, mean=shape.mean, weighting=weighting
            )
        return self._made[key]

    def _corrected(self, apart_N: Tensor, joined: "_Joined") -> tuple[Tensor, Tensor]:
        """The weight of each unit, and which tokens stay. `apart_N` is log k."""
        keep_N = torch.ones_like(apart_N, dtype=torch.bool)
        correction = self._shape.correction
        if correction is None:
            return torch.ones_like(joined.plus_U), keep_N
        if correction.kind == "icepop":
            low, high = math.log(correction.low), math.log(correction.high)
            keep_N = (apart_N >= low) & (apart_N <= high)
        has_tokens_U = joined.sums(keep_N) > 0
        if not correction.weighs:
            return has_tokens_U.double(), keep_N
        return has_tokens_U * joined.ratios(apart_N, keep_N).clamp(max=correction.high), keep_N

    def _costs(self, terms: Terms, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """Of each token, what it costs to leave the reference, less what entropy and imitation earn, (N,)."""
        logprob_N = terms["logprob"]
        cost_N = torch.zeros_like(logprob_N)
        if self._reference is not None and self._shape.kl:
            kl_N = _k3(self._reference(batch, samples) - logprob_N)
            self._sums["kl"] += float(kl_N.detach().sum())
            cost_N = cost_N + self._shape.kl * kl_N
        if self._shape.entropy:
            cost_N = cost_N - self._shape.entropy * terms["entropy"]
        if self._shape.imitation:
            cost_N = cost_N - self._shape.imitation * _is_good(batch, samples) * logprob_N
        return cost_N

    def _count(self, joined: "_Joined", ratio_U: Tensor, keep_N: Tensor) -> None:
        above = (ratio_U > 1 + self._shape.clip_high) & (joined.plus_U > 0)
        below = (ratio_U < 1 - self._shape.clip_low) & (joined.minus_U < 0)
        self._sums["clipped"] += int((above | below).sum())
        self._sums["units"] += len(ratio_U)
        self._sums["dropped"] += int((~keep_N).sum())
        self._sums["tokens"] += len(keep_N)


class Reference:
    """A policy that stays as it is; gives the log-probabilities of a batch's trained tokens, (N,)."""

    def __init__(self, model: Any, temperature: float) -> None:
        self._model = model
        self._temperature = temperature

    def __call__(self, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """Its log-probabilities after temperature."""
        hidden_ND = hidden_at(self._model, batch, samples)
        return head.logprobs(self._model, hidden_ND, batch.targets_N, self._temperature)


class _Joined:
    """The units of all trees of a batch: P pairs of a token and a unit, U units."""

    def __init__(self, trees: Sequence[Units], *, is_mean: bool) -> None:
        tokens: list[int] = []
        of: list[int] = []
        num_tokens = num_units = 0
        for tree in trees:
            tokens += [num_tokens + token for token in tree.tokens]
            of += [num_units + unit for unit in tree.of]
            num_tokens += len(tree.each)
            num_units += len(tree.plus)
        self._token_P, self._unit_P = torch.tensor(tokens), torch.tensor(of)
        self._is_mean = is_mean
        self.plus_U = _float64(value for tree in trees for value in tree.plus)
        self.minus_U = _float64(value for tree in trees for value in tree.minus)

    def ratios(self, apart_N: Tensor, keep_N: Tensor) -> Tensor:
        """The ratio of each unit: of the sum, or mean, of log-ratios over its tokens that stay, (U,)."""
        sum_U = self.sums(apart_N.double().where(keep_N, 0.0))
        if self._is_mean:
            sum_U = sum_U / self.sums(keep_N).clamp(min=1)
        return sum_U.clamp(max=FAR).exp()

    def sums(self, values_N: Tensor) -> Tensor:
        """The sum over the tokens of each unit, (U,)."""
        zero_U = torch.zeros_like(self.plus_U)
        return zero_U.index_add(0, self._unit_P, values_N.double()[self._token_P])


def _k3(apart_N: Tensor) -> Tensor:
    """The estimate of a KL from a log-ratio of the tokens that one of the two drew, (N,)."""
    return apart_N.clamp(max=FAR).exp() - apart_N - 1


def _is_good(batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
    """1 for tokens of answers that did not fail, in rollouts that passed; 0 for others, (N,)."""
    pairs = zip(batch.rows_N.tolist(), batch.turns_N.tolist(), strict=True)
    return _float64(
        samples[row].reward == 1.0 and turn not in samples[row].failed for row, turn in pairs
    )


def _in_order(values: PerToken, samples: Sequence[Sample]) -> Tensor:
    """Those of the samples' tokens, one after the other, (N,)."""
    return _float64(value for sample in samples for value in values[sample.rollout_id])


def _float64(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
