"""ZeRO by DeepSpeed: each process keeps a part of the optimizer's state, and of gradients if asked.

Trees go backwards many times, in parts and through the head apart, and a step adds all that up; DeepSpeed
expects one loss and each parameter's gradient once. So it is not given the model but its trained parameters,
which share their memory with the model's, and a loss whose gradients are those that have been added up.
"""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from katcore.settings import OptimizerSettings, ScaleSettings
from katcore.train import ranks
from katcore.train.stepper import adamw

# DeepSpeed would compile an all-reduce of its own for processors, minutes at the first start; gloo has one.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Sharded:
    """See `stepper.Stepper`. With stage 1 gradients are whole until the step, with 2 until a pass is over."""

    def __init__(
        self, parameters: Sequence[Tensor], settings: OptimizerSettings, scale: ScaleSettings
    ) -> None:
        self._parameters = parameters
        self._stage = scale.zero
        own = _Parameters(parameters)
        self._engine: Any = deepspeed.initialize(
            model=own,
            optimizer=adamw(list(own.parameters()), settings),
            config=_config(scale, settings.max_norm),
            dist_init_required=False,
        )[0]
        self._zero = self._engine.optimizer
        for parameter, shared in zip(parameters, own.parameters(), strict=True):
            parameter.data = shared.data

    def begin(self, lr: float) -> None:
        """See `Stepper`."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._clear()

    def collect(self, *, is_last: bool) -> None:
        """See `Stepper`."""
        if self._stage == 1 and not is_last:
            return
        # DeepSpeed takes the mean over processes; a step's gradient is their sum.
        grads = [
            torch.zeros_like(parameter)
            if parameter.grad is None
            else parameter.grad * ranks.world()
            for parameter in self._parameters
        ]
        self._clear()
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(self._engine(grads), scale_wrt_gas=False)

    def step(self) -> float:
        """See `Stepper`."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self) -> dict[str, Any]:
        """See `Stepper`."""
        return {
            "adamw": self._zero.optimizer.state_dict(),
            "weights": [part.detach() for part in self._zero.single_partition_of_fp32_groups],
        }

    def load(self, state: dict[str, Any]) -> None:
        """See `Stepper`."""
        self._zero.optimizer.load_state_dict(state["adamw"])
        parts = zip(self._zero.single_partition_of_fp32_groups, state["weights"], strict=True)
        for part, saved in parts:
            part.data.copy_(saved)

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class _Parameters(nn.Module):
    """Parameters, and a loss with the gradients that it is given."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(parameter.data) for parameter in parameters)

    def forward(self, grads: Sequence[Tensor]) -> Tensor:
        """Zero."""
        loss: Tensor = _Given.apply(grads, *self.all)  # type: ignore[no-untyped-call]
        return loss


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None, *ctx.grads)


def _config(scale: ScaleSettings, max_norm: float) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": scale.zero, "overlap_comm": False}
    if scale.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "zero_optimization": zero,
        # torch's AdamW, also where the state is offloaded: DeepSpeed's own is compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
