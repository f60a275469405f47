"""Steps of a model whose layers are `scattered`: each process changes its own part of their weights."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from katcore.settings import OptimizerSettings
from katcore.train import ranks
from katcore.train.scattered import Scattered
from katcore.train.stepper import adamw


class Layerwise:
    """See `stepper.Stepper`.

    With `offload` the optimizer works in main memory, on copies of the weights and gradients that are not
    there.
    """

    def __init__(
        self,
        model: Any,
        layers: Scattered,
        settings: OptimizerSettings,
        offload: Literal["none", "optimizer", "all"] = "none",
    ) -> None:
        self._max_norm = settings.max_norm
        self._own = [shard for shard in layers.shards if shard.requires_grad]
        self._whole = [p for p in model.parameters() if p.requires_grad]
        self._learnt = [*self._own, *self._whole]
        # With `all` the shards are there already.
        copied = {"none": [], "optimizer": self._learnt, "all": self._whole}[offload]
        self._copies = [(one, nn.Parameter(_in_main_memory(one))) for one in copied]
        there = {"none": self._learnt, "optimizer": [], "all": self._own}[offload]
        self._optimizer = adamw([*there, *(copy for _, copy in self._copies)], settings)

    def begin(self, lr: float) -> None:
        """See `Stepper`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for parameter in self._learnt:
            parameter.grad = None

    def collect(self, *, is_last: bool) -> None:
        """See `Stepper`."""

    def step(self) -> float:
        """See `Stepper`."""
        ranks.sum_gradients(self._whole)
        own = ranks.totals({"norm": _squares(self._own)})["norm"]
        norm = math.sqrt(own + _squares(self._whole))
        if math.isfinite(norm):
            for parameter in self._learnt:
                if parameter.grad is not None:
                    parameter.grad.mul_(min(1.0, self._max_norm / (norm + 1e-6)))
            self._change()
        return norm

    def _change(self) -> None:
        for parameter, copy in self._copies:
            copy.grad = None if parameter.grad is None else _in_main_memory(parameter.grad)
        self._optimizer.step()
        for parameter, copy in self._copies:
            parameter.data.copy_(copy.data)
            copy.grad = None

    def state(self) -> dict[str, Any]:
        """See `Stepper`."""
        shards = [shard.detach() for shard in self._own]
        return {"adamw": self._optimizer.state_dict(), "shards": shards}

    def load(self, state: dict[str, Any]) -> None:
        """See `Stepper`."""
        for shard, saved in zip(self._own, state["shards"], strict=True):
            shard.data.copy_(saved)
        for parameter, copy in self._copies:
            copy.data.copy_(parameter.data)
        self._optimizer.load_state_dict(state["adamw"])


def _in_main_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _squares(parameters: Sequence[Tensor]) -> float:
    return sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)
