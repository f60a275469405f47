"""Objectives have one shape: logits of the trained tokens of a token-tree batch to a summed loss.

A loss takes two steps: from logits, a few numbers of each token (`Loss.terms`), and from those of all tokens
the sum (`Loss.total`). So the logits need not all be there at once (`head`), though the loss of a token may
depend on any other. It is a sum, and the objective says what that of a whole step is divided by, so that
splitting a step into micro-batches changes nothing.

- `Sft`: negative log-likelihood, mean over tokens.
- `PolicyGradient` (in `surrogate`): reinforcement.
- `Distillation` (in `distill`): the distance to a teacher on the student's own tokens.

Proven against finite differences and TRL's formulas in tests/train/test_objective.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.batch import TreeBatch, Weighting, token_weights

Metrics = dict[str, float]

FAR = 20.0
"""Log-ratios above it count as it: a ratio beyond 5e8 has no gradient, and nothing overflows."""

Terms = dict[str, Tensor]
"""By name, numbers of M trained tokens, (M,), with their gradient or without."""


class Loss(NamedTuple):
    """An objective's loss of one batch."""

    terms: Callable[[Tensor, Tensor], Terms]
    """From logits_MV and chosen_M: what the loss has to know of these M of the N trained tokens."""
    total: Callable[[Terms], Tensor]
    """From the terms of all tokens, in order: the weighted sum. They are on the CPU."""


class Objective(Protocol):
    """A loss over the trained tokens of a batch.

    One that `is_separable` (by default none is) needs nothing but the fields of a token itself: on some of a
    batch's tokens (`TreeBatch.only`) it is their share of the loss.
    """

    def on(self, batch: TreeBatch, samples: Sequence[Sample]) -> Loss:
        """The loss of a batch, of which `samples` are the rows; made anew each time it is computed."""

    def weight(self, samples: Sequence[Sample], weighting: Weighting) -> float:
        """What the sum over the samples of a whole step is divided by."""

    def __call__(self, logits_NV: Tensor, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
        """The weighted sum of the losses, from all logits at once."""
        loss = self.on(batch, samples)
        terms = loss.terms(logits_NV, torch.arange(len(logits_NV)))
        return loss.total({name: value_N.cpu() for name, value_N in terms.items()})


def is_separable(objective: Objective) -> bool:
    """See `Objective`."""
    return getattr(objective, "is_separable", False)


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Log pi(target) after temperature, (N,)."""
    scaled_NV = logits_NV / temperature
    chosen_N = scaled_NV.gather(1, targets_N[:, None].to(logits_NV.device))[:, 0]
    return chosen_N - scaled_NV.logsumexp(1)


class TokenMean(Objective, Protocol):
    """An objective whose step is the weighted mean over trained tokens."""

    def weight(self, samples: Sequence[Sample], weighting: Weighting) -> float:
        """See `Objective.weight`."""
        return sum(sample_weight(sample, weighting) for sample in samples)


class Sft(TokenMean):
    """Supervised fine-tuning."""

    is_separable = True

    def on(self, batch: TreeBatch, samples: Sequence[Sample]) -> Loss:
        """-sum of w_t log pi(y_t)."""

        def terms(logits_MV: Tensor, chosen_M: Tensor) -> Terms:
            return {"logprob": token_logprobs(logits_MV, batch.targets_N[chosen_M])}

        return Loss(terms, lambda terms: -(batch.weights_N * terms["logprob"]).sum())


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
