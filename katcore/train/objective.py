"""Three objectives, one shape: logits of the trained tokens of a token-tree batch to a summed loss.

Each returns a sum over tokens, weighted by `batch.weights_N`; the trainer divides by the weight of the
whole step, so that splitting a step into micro-batches changes nothing (token mean, as in DAPO).

- `Sft`: negative log-likelihood.
- `PolicyGradient`: PPO's clipped surrogate with an advantage per turn, normalised in the group of a task
  (GRPO, arXiv 2402.03300), clip range asymmetric (DAPO, arXiv 2503.14476), no KL term.
- `ReverseKl`: KL(student || teacher) over the whole vocabulary on the student's own tokens
  (on-policy distillation; GKD with beta = 1, arXiv 2306.13649).

Proven against finite differences and TRL's formulas in tests/train/test_objective.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.batch import TreeBatch, num_leaves, turns

Metrics = dict[str, float]
Advantages = dict[str, tuple[float, ...]]
"""By rollout id, one for each turn."""


class Objective(Protocol):
    """A loss over the trained tokens of a batch."""

    def __call__(self, logits_NV: Tensor, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """The weighted sum of the tokens' losses; `samples` are the rows of the batch."""


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Log pi(target) after temperature, (N,)."""
    scaled_NV = logits_NV / temperature
    chosen_N = scaled_NV.gather(1, targets_N[:, None])[:, 0]
    return chosen_N - scaled_NV.logsumexp(1)


class Sft:
    """Supervised fine-tuning."""

    def __call__(self, logits_NV: Tensor, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """-sum of w_t log pi(y_t)."""
        return -(batch.weights_N * token_logprobs(logits_NV, batch.targets_N)).sum()


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """Clipped policy gradient. `advantages` by rollout id, one per turn; `temperature` is the sampler's."""

    advantages: Advantages
    clip_low: float
    clip_high: float
    temperature: float = 1.0

    def __call__(self, logits_NV: Tensor, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """-sum of w_t min(r_t A, clip(r_t, 1 - low, 1 + high) A), r_t = pi / pi_old."""
        refuse_unsampled(samples)
        rows = [self.advantages[sample.rollout_id] for sample in samples]
        values = [
            rows[row][turn]
            for row, turn in zip(batch.rows_N.tolist(), batch.turns_N.tolist(), strict=True)
        ]
        advantage_N = torch.tensor(values, dtype=logits_NV.dtype)
        ratio_N = (token_logprobs(logits_NV, batch.targets_N, self.temperature) - batch.old_N).exp()
        clipped_N = ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
        return -(batch.weights_N * gain_N).sum()


@dataclass(frozen=True, slots=True)
class ReverseKl:
    """On-policy distillation. `teacher(batch, samples)` gives the teacher's logits, (N, V)."""

    teacher: Callable[[TreeBatch, Sequence[Sample]], Tensor]

    def __call__(self, logits_NV: Tensor, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """Sum of w_t KL(pi_student(. | h_t) || pi_teacher(. | h_t))."""
        refuse_unsampled(samples)
        student_NV = logits_NV.log_softmax(1)
        teacher_NV = self.teacher(batch, samples).log_softmax(1)
        kl_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(1)
        return (batch.weights_N * kl_N).sum()


def refuse_unsampled(samples: Sequence[Sample]) -> None:
    """Raise StageError unless every sample's ids were drawn by an engine."""
    for sample in samples:
        if sample.origin != "sampled":
            raise StageError(
                f"{sample.rollout_id}: its ids are {sample.origin}, not sampled;"
                " training on policy refuses it"
            )


def group_advantages(samples: Sequence[Sample], *, discount: float = 1.0) -> Advantages:
    """(G - mean) / (std + 1e-6) of the turns' returns in the rollouts of each task.

    The return G of turn n of N is the rollout's reward times discount^(N - n): what was said long before the
    end earns less of a success, so wasted turns cost. With a discount of 1 each turn has its rollout's
    reward, as in GRPO. Mean and deviation count each rollout once, however many turns it has (as the
    turn-level objective does, with 1 / N). Groups without variance are left out.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.task_id, []).append(sample)
    advantages: Advantages = {}
    for group in groups.values():
        if len({sample.reward for sample in group}) > 1:
            returns = {item.rollout_id: _returns(item, discount) for item in group}
            mean = fmean(fmean(values) for values in returns.values())
            spread = (
                fmean(fmean((value - mean) ** 2 for value in values) for values in returns.values())
                ** 0.5
            )
            advantages |= {
                name: tuple((value - mean) / (spread + 1e-6) for value in values)
                for name, values in returns.items()
            }
    return advantages


def _returns(sample: Sample, discount: float) -> tuple[float, ...]:
    num = 1 + turns(sample)[-1]
    return tuple(float(sample.reward or 0.0) * discount ** (num - 1 - turn) for turn in range(num))


def equal_weight(advantages: Advantages, samples: Sequence[Sample]) -> Advantages:
    """Advantages scaled so that under a token mean each rollout counts the same, however long it is.

    The clipped surrogate is linear in a positive factor of the advantage, so this is the mean over rollouts
    of the mean over their tokens (GRPO). A failed rollout is often the longest: by token, most of a step
    would go into making failures less likely, and little into making successes more so.
    """
    sizes = {sample.rollout_id: sample_weight(sample) for sample in samples}
    mean = sum(sizes[name] for name in advantages) / max(1, len(advantages))
    return {
        name: tuple(value * mean / sizes[name] for value in values)
        for name, values in advantages.items()
    }


def sample_weight(sample: Sample) -> float:
    """The weight of a sample's trained tokens, sum of g_t / K: what a token mean divides by."""
    leaves = num_leaves(sample)
    return sum(
        branches / leaves
        for branches, is_trained in zip(sample.branches, sample.trained, strict=True)
        if is_trained
    )
