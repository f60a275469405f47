"""The vocabulary projection and what is behind it, for so many tokens at a time that their logits fit.

The gradient of a loss needs the logits twice if there are more: once for the few numbers of each token that
the loss is made of (`objective.Terms`), then, with its gradient for those, once more to go on backwards. That
is a third more arithmetic of the projection. A separable loss needs them once, and so does any that fits.
Proven equal to all logits at once in tests/train/test_head.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train.batch import TreeBatch
from katcore.train.objective import Loss, Objective, Terms, is_separable, token_logprobs
from katcore.train.policy import logits_of

MAX_LOGITS = 1 << 25
"""128 MiB of them in float32; at its peak a loss takes five to eight times as much."""


def backward(
    model: Any,
    hidden_ND: Tensor,
    batch: TreeBatch,
    samples: Sequence[Sample],
    objective: Objective,
    weight: float,
) -> tuple[float, Tensor]:
    """The loss / weight, and its gradient for the last hidden states, (N, D).

    The gradient for the projection's weights is added to them.
    """
    hidden_ND = hidden_ND.detach().requires_grad_()
    chunks = _chunks(model, hidden_ND)
    if len(chunks) > 1 and not is_separable(objective):
        found = _twice(model, hidden_ND, chunks, objective.on(batch, samples), weight)
    else:
        found = 0.0
        for chosen_M in chunks:
            logits_MV = logits_of(model, hidden_ND[chosen_M])
            part = objective(logits_MV, batch.only(chosen_M), samples) / weight
            part.backward()  # type: ignore[no-untyped-call]
            found += float(part.detach())
    assert hidden_ND.grad is not None
    return found, hidden_ND.grad


def logprobs(model: Any, hidden_ND: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
    """Log pi(target) after temperature, (N,), on the CPU and without gradients."""
    with torch.no_grad():
        parts = [
            token_logprobs(logits_of(model, hidden_ND[chosen_M]), targets_N[chosen_M], temperature)
            for chosen_M in _chunks(model, hidden_ND)
        ]
    return torch.cat(parts).cpu()


def _twice(
    model: Any, hidden_ND: Tensor, chunks: Sequence[Tensor], loss: Loss, weight: float
) -> float:
    with torch.no_grad():
        parts = [loss.terms(logits_of(model, hidden_ND[chosen_M]), chosen_M) for chosen_M in chunks]
    terms: Terms = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    for values_N in terms.values():
        if values_N.is_floating_point():
            values_N.requires_grad_()
    total = loss.total(terms) / weight
    total.backward()  # type: ignore[no-untyped-call]
    for chosen_M in chunks:
        again = loss.terms(logits_of(model, hidden_ND[chosen_M]), chosen_M)
        learnt = [
            (value_M, grad_N[chosen_M].to(value_M.device))
            for name, value_M in again.items()
            if value_M.requires_grad and (grad_N := terms[name].grad) is not None
        ]
        torch.autograd.backward([value for value, _ in learnt], [grad for _, grad in learnt])
    return float(total.detach())


def _chunks(model: Any, hidden_ND: Tensor) -> Sequence[Tensor]:
    num = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    return torch.arange(len(hidden_ND)).split(num)  # type: ignore[no-untyped-call, no-any-return]
