"""From gradients to new weights, in all processes: AdamW, with the norm of the gradient clipped."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from katcore.settings import OptimizerSettings
from katcore.train import ranks


class Stepper(Protocol):
    """Changes a model's weights."""

    def begin(self, lr: float) -> None:
        """A new step: no gradients yet."""

    def collect(self, *, is_last: bool) -> None:
        """A pass went all the way back; its gradients may be put away.

        All processes do as many of these: one that has less to compute comes with no gradients.
        """

    def step(self) -> float:
        """Change the weights; the norm of the whole gradient. If that is not finite nothing is changed."""

    def state(self) -> dict[str, Any]:
        """What this process keeps from step to step."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, once the model has its weights."""


class Replicated:
    """Each process has all weights and the optimizer's whole state."""

    def __init__(self, parameters: Sequence[Tensor], settings: OptimizerSettings) -> None:
        self._parameters = parameters
        self._max_norm = settings.max_norm
        self._optimizer = adamw(parameters, settings)

    def begin(self, lr: float) -> None:
        """See `Stepper`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)

    def collect(self, *, is_last: bool) -> None:
        """See `Stepper`."""

    def step(self) -> float:
        """See `Stepper`."""
        ranks.sum_gradients(self._parameters)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        if torch.isfinite(norm):
            self._optimizer.step()
        return float(norm)

    def state(self) -> dict[str, Any]:
        """See `Stepper`."""
        return self._optimizer.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """See `Stepper`."""
        self._optimizer.load_state_dict(state)


def adamw(parameters: Sequence[Tensor], settings: OptimizerSettings) -> torch.optim.AdamW:
    """The optimizer; its learning rate is set at each step."""
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
