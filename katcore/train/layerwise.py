"""Weights of layers kept once over all processes (ZeRO-3): whole in a process only while a layer computes.

A layer's weights are gathered as it begins and dropped as it ends; on the way back it is computed again, so
they are gathered again. Gathering is part of the graph: going back leaves each process with its own part of
the gradient's sum. DeepSpeed's stage 3 cannot do it: in a pass it takes the gradient of a parameter once,
and trees in parts go back many times, one within the other. That all processes gather alike is `lockstep`'s.

Embeddings, the last norm and the output projection stay whole in each process.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from katcore.train import ranks
from katcore.train.lockstep import Lockstep
from katcore.train.stepper import MAX_NORM, adamw


class Layerwise:
    """See `stepper.Stepper`."""

    def __init__(self, model: Any, weight_decay: float) -> None:
        self._layers = [_Layer(layer) for layer in model.base_model.layers]
        model.lockstep = Lockstep(model)
        self._shards = [part.shard for layer in self._layers for part in layer.parts]
        self._own = [shard for shard in self._shards if shard.requires_grad]
        self._whole = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = adamw([*self._own, *self._whole], weight_decay)

    def begin(self, lr: float) -> None:
        """See `Stepper`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)

    def collect(self, *, is_last: bool) -> None:
        """See `Stepper`."""

    def step(self) -> float:
        """See `Stepper`."""
        ranks.sum_gradients(self._whole)
        own = ranks.totals({"norm": _squares(self._own)})["norm"]
        norm = math.sqrt(own + _squares(self._whole))
        if math.isfinite(norm):
            for parameter in (*self._own, *self._whole):
                if parameter.grad is not None:
                    parameter.grad.mul_(min(1.0, MAX_NORM / (norm + 1e-6)))
            self._optimizer.step()
        return norm

    def state(self) -> dict[str, Any]:
        """See `Stepper`."""
        shards = [shard.detach() for shard in self._shards]
        return {"adamw": self._optimizer.state_dict(), "shards": shards}

    def load(self, state: dict[str, Any]) -> None:
        """See `Stepper`."""
        for shard, saved in zip(self._shards, state["shards"], strict=True):
            shard.data.copy_(saved)
        self._optimizer.load_state_dict(state["adamw"])

    def restore(self) -> None:
        """Give every process all weights again, at the end."""
        for layer in self._layers:
            layer.restore()


class _Layer:
    """A layer whose weights are elsewhere, those that are trained apart from those that are not."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._plain = layer.forward
        places = [
            (module, name, parameter)
            for module in layer.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.parts = [
            _Part([place for place in places if place[2].requires_grad == is_trained])
            for is_trained in (True, False)
            if any(place[2].requires_grad == is_trained for place in places)
        ]
        layer.forward = functools.partial(_again, self)

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer makes of its input."""
        for part in self.parts:
            part.fill()
        try:
            return self._plain(*args, **kwargs)
        finally:
            for part in self.parts:
                part.empty()

    def restore(self) -> None:
        """A plain layer again."""
        with torch.no_grad():
            for part in self.parts:
                part.fill()
                part.keep()
        self._layer.forward = self._plain


def _again(layer: _Layer, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer.compute(*args, **kwargs)
    return checkpoint(layer.compute, *args, use_reentrant=False, **kwargs)


class _Part:
    """Parameters of a layer as one row of numbers, of which this process has a share."""

    def __init__(self, places: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
        self._places = [(module, name) for module, name, _ in places]
        self._shapes = [parameter.shape for *_, parameter in places]
        flat = torch.cat([parameter.detach().flatten() for *_, parameter in places])
        size = -(-len(flat) // ranks.world())
        flat = torch.nn.functional.pad(flat, (0, size * ranks.world() - len(flat)))
        self.shard = nn.Parameter(
            flat[ranks.rank() * size :][:size].clone(), requires_grad=places[0][2].requires_grad
        )
        self.empty()

    def fill(self) -> None:
        """Give the layer its weights."""
        flat: Tensor = _Gather.apply(self.shard)  # type: ignore[no-untyped-call]
        done = 0
        for (module, name), shape in zip(self._places, self._shapes, strict=True):
            module._parameters[name] = flat[done : done + shape.numel()].view(shape)  # type: ignore[assignment]
            done += shape.numel()

    def empty(self) -> None:
        """Take them away."""
        for module, name in self._places:
            module._parameters[name] = None

    def keep(self) -> None:
        """Leave those that it has to it."""
        for module, name in self._places:
            weight = module._parameters[name]
            assert weight is not None
            module._parameters[name] = nn.Parameter(weight.clone())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        if ranks.world() == 1:
            return shard.clone()
        flat = shard.new_empty(len(shard) * ranks.world())
        dist.all_gather_into_tensor(flat, shard.detach())
        return flat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        if ranks.world() == 1:
            return grad
        own = grad.new_empty(len(grad) // ranks.world())
        dist.reduce_scatter_tensor(own, grad.contiguous())
        return own


def _squares(parameters: Sequence[Tensor]) -> float:
    return sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)
