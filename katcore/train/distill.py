"""On-policy distillation: how far the student is from a teacher, on the tokens that the student said.

With p the student and q the teacher after the same tokens, the cost of a token is one of

- `reverse-kl`: KL(p || q), the sum of p_v log(p_v / q_v) over the vocabulary (GKD with beta = 1, arXiv
  2306.13649);
- `top-k`: the same over the k likeliest tokens of one of the two, S, and one bucket for all others: the sum
  over S of p_v log(p_v / q_v), plus p_R log(p_R / q_R), where p_R is 1 less the sum over S of p_v. S is taken
  as given. It is at most the KL, for what is merged cannot differ, and the KL itself if S is the vocabulary;
- `policy-gradient`: of the token y that was drawn alone, -min(r A, clip(r) A), where r is p_y over the
  sampler's, and A = A_RL + strength clip(log q_y - log p_y) is taken as given (MOPD, arXiv 2606.30406).
  Where nothing is clipped and A_RL is 0, its gradient is in expectation that of strength KL(p || q), whatever
  the sampler: r makes up for it, and grad KL = E_p[log(p_y / q_y) grad log p_y];
- `likelihood`: -log p_y, of what the teacher said: not on policy, for a beginning.

Tokens of which the two have little in common may count less, and what follows many such may be left out
(KAT-Coder-V2.5, arXiv 2607.05471). Departs from it in the weight, which it leaves open: overlap^power.
Proven in tests/train/test_distill.py: exact enumeration, finite differences, TRL's losses, trees.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train import ranks
from katcore.train.advantage import Advantages
from katcore.train.batch import TreeBatch, Weighting
from katcore.train.frozen import hidden_at
from katcore.train.objective import (
    FAR,
    Loss,
    Metrics,
    Terms,
    TokenMean,
    refuse_unsampled,
    sample_weight,
)
from katcore.train.policy import logits_of

Kind = Literal["reverse-kl", "top-k", "policy-gradient", "likelihood"]


class Taught(Protocol):
    """A teacher's logits of N tokens: those themselves, (N, V), or what makes those that are asked for."""

    def __getitem__(self, chosen_M: Tensor, /) -> Tensor:
        """Of the chosen ones, (M, V)."""


Teacher = Callable[[TreeBatch, Sequence[Sample]], Taught]
"""From a batch: the teacher's logits of its trained tokens."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A token counts (|top k of p and of q| / k)^power.

    After `limit` tokens in a row, on their path, that have less than `least` in common, the rest of the path
    counts nothing; with a limit of 0 all of it does.
    """

    k: int
    power: float = 1.0
    limit: int = 0
    least: float = 0.5


@dataclass(frozen=True, slots=True)
class Divergence:
    """The cost of a token. `support` says whose k likeliest tokens; `temperature` is the sampler's.

    A temperature other than 1 has the policy gradient compare both policies at it, as they were sampled.
    """

    kind: Kind = "reverse-kl"
    k: int = 32
    support: Literal["teacher", "student"] = "teacher"
    strength: float = 1.0
    most: float = 5.0
    clip_low: float = 0.2
    clip_high: float = 0.28
    temperature: float = 1.0
    overlap: Overlap | None = None


class Teachers:
    """The experts' models by name. `chosen` names the one of a (domain, task id), if not the domain's."""

    def __init__(
        self, models: Mapping[str, Any], chosen: Mapping[tuple[str, str], str] | None = None
    ) -> None:
        self._models = models
        self._chosen = chosen or {}

    def name(self, sample: Sample) -> str:
        """Who teaches a sample."""
        return self._chosen.get((sample.domain, sample.task_id), sample.domain)

    def __call__(self, batch: TreeBatch, samples: Sequence[Sample]) -> Taught:
        """See `Teacher`. A batch has one teacher."""
        (name,) = {self.name(sample) for sample in samples}
        model = self._models[name]
        return _Head(model, hidden_at(model, batch, samples))


@dataclass(frozen=True, slots=True)
class _Head:
    """Keeps what is below the vocabulary projection, which is V / D times less."""

    model: Any
    hidden_ND: Tensor

    def __getitem__(self, chosen_M: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_of(self.model, self.hidden_ND[chosen_M])


class Distillation(TokenMean):
    """A divergence as an objective; notes what it sees until it is asked.

    `advantages` are A_RL of some rollouts, 0 for others. `scale` weighs whole domains. `calls` marks, by
    rollout id, which of the trained tokens are inside tool calls. The samples of a batch are of one domain.
    """

    def __init__(
        self,
        teacher: Teacher,
        shape: Divergence = Divergence(),
        *,
        advantages: Advantages | None = None,
        scale: Mapping[str, float] | None = None,
        calls: Mapping[str, Sequence[bool]] | None = None,
    ) -> None:
        self._teacher = teacher
        self._shape = shape
        self._advantages = advantages or {}
        self._scale = scale or {}
        self._calls = calls or {}
        self._seen: dict[str, tuple[float, float]] = {}

    def on(self, batch: TreeBatch, samples: Sequence[Sample]) -> Loss:
        """Sum of w_t times the cost of each token."""
        refuse_unsampled(samples)
        taught = self._teacher(batch, samples)

        def terms(logits_MV: Tensor, chosen_M: Tensor) -> Terms:
            return self._terms(logits_MV, taught[chosen_M], batch.targets_N[chosen_M])

        return Loss(terms, lambda terms: self._total(terms, batch, samples))

    def seen(self) -> Metrics:
        """Means over tokens since the last time.

        `kl` and `kl/<domain>`: KL(p || q), whatever the loss; `kl_calls`: of tokens in tool calls; `entropy`
        of p; `agreement`: how often both have the same likeliest token; `overlap`; of the policy gradient,
        `clip_rate`: how often the clip held a ratio back, and `difference_clip_rate`: how often
        log q - log p was cut.
        """
        sums = ranks.totals({name: total for name, (total, _) in self._seen.items()})
        weights = ranks.totals({name: weight for name, (_, weight) in self._seen.items()})
        found = {name: total / weights[name] for name, total in sums.items() if weights[name]}
        self._seen = {}
        return found

    def _terms(self, logits_MV: Tensor, taught_MV: Tensor, targets_M: Tensor) -> Terms:
        """What is learnt from: `cost`, or `logprob` and the teacher's; and what is only looked at."""
        shape = self._shape
        if shape.kind == "policy-gradient" and shape.temperature != 1:
            logits_MV, taught_MV = logits_MV / shape.temperature, taught_MV / shape.temperature
        student_MV, teacher_MV = logits_MV.log_softmax(1), taught_MV.log_softmax(1)
        found: Terms = {}
        at_M1 = targets_M[:, None].to(logits_MV.device)
        if shape.kind == "policy-gradient":
            found["logprob"] = student_MV.gather(1, at_M1)[:, 0]
            found["taught"] = teacher_MV.gather(1, at_M1)[:, 0]
        elif shape.kind == "likelihood":
            found["cost"] = -student_MV.gather(1, at_M1)[:, 0]
        elif shape.kind == "top-k" and shape.k < student_MV.shape[1]:
            likeliest_MV = teacher_MV if shape.support == "teacher" else student_MV
            found["cost"] = top_k_kl(student_MV, teacher_MV, likeliest_MV.topk(shape.k, 1).indices)
        else:
            found["cost"] = reverse_kl(student_MV, teacher_MV)
        with torch.no_grad():
            is_kl = shape.kind == "reverse-kl"
            found["kl"] = found["cost"] if is_kl else reverse_kl(student_MV, teacher_MV)
            found["entropy"] = -torch.linalg.vecdot(student_MV.exp(), student_MV)
            found["agreement"] = student_MV.argmax(1) == teacher_MV.argmax(1)
            if shape.overlap:
                found["overlap"] = overlap(student_MV, teacher_MV, shape.overlap.k)
        return found

    def _total(self, terms: Terms, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        weight_N = batch.weights_N * self._scale.get(samples[0].domain, 1.0)
        if self._shape.overlap:
            weight_N = weight_N * trusted(terms["overlap"], samples, self._shape.overlap)
            self._note("overlap", terms["overlap"], batch.weights_N)
        cost_N = terms.get("cost")
        if cost_N is None:
            cost_N = self._policy_gradient(terms, batch, samples)
        self._look(terms, batch, samples)
        return (weight_N * cost_N).sum()

    def _policy_gradient(self, terms: Terms, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        shape = self._shape
        logprob_N = terms["logprob"].double()
        apart_N = terms["taught"] - logprob_N.detach()
        pairs = zip(batch.rows_N.tolist(), batch.turns_N.tolist(), strict=True)
        reinforced = [self._advantage(samples[row], turn) for row, turn in pairs]
        gain_N = torch.tensor(reinforced, dtype=torch.float64)
        gain_N = gain_N + shape.strength * apart_N.clamp(-shape.most, shape.most)
        ratio_N = (logprob_N - batch.old_N).clamp(max=FAR).exp()
        low, high = 1 - shape.clip_low, 1 + shape.clip_high
        held_N = ((ratio_N > high) & (gain_N > 0)) | ((ratio_N < low) & (gain_N < 0))
        self._note("clip_rate", held_N, batch.weights_N)
        self._note("difference_clip_rate", apart_N.abs() > shape.most, batch.weights_N)
        return -torch.minimum(ratio_N * gain_N, ratio_N.clamp(low, high) * gain_N)

    def _advantage(self, sample: Sample, turn: int) -> float:
        rows = self._advantages.get(sample.rollout_id)
        return rows[0][turn] if rows else 0.0

    def _look(self, terms: Terms, batch: TreeBatch, samples: Sequence[Sample]) -> None:
        kl_N, weights_N = terms["kl"], batch.weights_N
        self._note("kl", kl_N, weights_N)
        self._note(f"kl/{samples[0].domain}", kl_N, weights_N)
        self._note("entropy", terms["entropy"], weights_N)
        self._note("agreement", terms["agreement"], weights_N)
        if any(any(self._calls.get(sample.rollout_id, ())) for sample in samples):
            marks = [mark for sample in samples for mark in self._calls[sample.rollout_id]]
            self._note("kl_calls", kl_N, weights_N * torch.tensor(marks))

    def _note(self, name: str, values_N: Tensor, weights_N: Tensor) -> None:
        total, weight = self._seen.get(name, (0.0, 0.0))
        self._seen[name] = (
            total + float((weights_N * values_N.detach()).sum()),
            weight + float(weights_N.sum()),
        )


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, (N,)."""
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(1)


def top_k_kl(student_NV: Tensor, teacher_NV: Tensor, support_NK: Tensor) -> Tensor:
    """KL(p || q) where all tokens that are not in the support, K < V of them, are one, (N,)."""
    outside_NV = torch.ones_like(student_NV, dtype=torch.bool).scatter(1, support_NK, False)
    parts = []
    for logprobs_NV in (student_NV, teacher_NV):
        rest_N1 = logprobs_NV.where(outside_NV, -torch.inf).logsumexp(1, keepdim=True)
        parts.append(torch.cat([logprobs_NV.gather(1, support_NK), rest_N1], 1))
    return reverse_kl(*parts)


def overlap(student_NV: Tensor, teacher_NV: Tensor, k: int) -> Tensor:
    """The share of the k likeliest tokens that both have, (N,)."""
    k = min(k, student_NV.shape[1])
    none_NV = torch.zeros_like(student_NV, dtype=torch.bool)
    ours_NV, theirs_NV = (
        none_NV.scatter(1, likely_NV.topk(k, 1).indices, True)
        for likely_NV in (student_NV.detach(), teacher_NV)
    )
    return (ours_NV & theirs_NV).sum(1).double() / k


def trusted(overlap_N: Tensor, samples: Sequence[Sample], shape: Overlap) -> Tensor:
    """What each token counts for its overlap, (N,)."""
    trust_N = overlap_N**shape.power
    if shape.limit:
        lows = iter((overlap_N < shape.least).tolist())
        cut = [is_cut for sample in samples for is_cut in _cut(sample, lows, shape.limit)]
        trust_N = trust_N * ~torch.tensor(cut)
    return trust_N


def _cut(sample: Sample, lows: Any, limit: int) -> list[bool]:
    """Which trained tokens come after `limit` low ones in a row; context neither counts nor breaks a row."""
    states: list[tuple[int, bool]] = []
    found: list[bool] = []
    for parent, is_trained in zip(sample.parents, sample.trained, strict=True):
        row, is_cut = states[parent] if parent >= 0 else (0, False)
        if is_trained:
            found.append(is_cut)
            row = row + 1 if next(lows) else 0
            is_cut = is_cut or row >= limit
        states.append((row, is_cut))
    return found


def domain_scale(samples: Sequence[Sample], weighting: Weighting = "path") -> dict[str, float]:
    """What has every domain weigh the same in a mean over tokens, however many it has."""
    weights: dict[str, float] = {}
    for sample in samples:
        weights[sample.domain] = weights.get(sample.domain, 0.0) + sample_weight(sample, weighting)
    mean = sum(weights.values()) / len(weights)
    return {domain: mean / weight for domain, weight in weights.items() if weight}
