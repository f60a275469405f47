"""Objectives have one shape: logits of the trained tokens of a token-tree batch to a summed loss.

Each returns a sum, and says what the sum of a whole step is divided by, so that splitting a step into
micro-batches changes nothing.

- `Sft`: negative log-likelihood, mean over tokens.
- `PolicyGradient` (in `surrogate`): reinforcement.
- `Distillation` (in `distill`): the distance to a teacher on the student's own tokens.

Proven against finite differences and TRL's formulas in tests/train/test_objective.py.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.batch import TreeBatch, Weighting, token_weights

Metrics = dict[str, float]


class Objective(Protocol):
    """A loss over the trained tokens of a batch.

    One that `is_separable` (by default none is) needs nothing but the fields of a token itself: on some of a
    batch's tokens (`TreeBatch.only`) it is their share of the loss.
    """

    def __call__(self, logits_NV: Tensor, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """The weighted sum of the losses; `samples` are the rows of the batch."""

    def weight(self, samples: Sequence[Sample], weighting: Weighting) -> float:
        """What the sum over the samples of a whole step is divided by."""


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Log pi(target) after temperature, (N,)."""
    scaled_NV = logits_NV / temperature
    chosen_N = scaled_NV.gather(1, targets_N[:, None])[:, 0]
    return chosen_N - scaled_NV.logsumexp(1)


class TokenMean:
    """An objective whose step is the weighted mean over trained tokens."""

    def weight(self, samples: Sequence[Sample], weighting: Weighting) -> float:
        """See `Objective.weight`."""
        return sum(sample_weight(sample, weighting) for sample in samples)


class Sft(TokenMean):
    """Supervised fine-tuning."""

    is_separable = True

    def __call__(self, logits_NV: Tensor, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """-sum of w_t log pi(y_t)."""
        return -(batch.weights_N * token_logprobs(logits_NV, batch.targets_N)).sum()


def refuse_unsampled(samples: Sequence[Sample]) -> None:
    """Raise StageError unless every sample's ids were drawn by an engine."""
    for sample in samples:
        if sample.origin != "sampled":
            raise StageError(
                f"{sample.rollout_id}: its ids are {sample.origin}, not sampled;"
                " training on policy refuses it"
            )


def sample_weight(sample: Sample, weighting: Weighting = "path") -> float:
    """The weight of a sample's trained tokens: what a token mean divides by."""
    return sum(token_weights(sample, weighting))
