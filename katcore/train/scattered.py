"""Weights of layers kept once over all processes (ZeRO-3): whole in a process only while a layer computes.

A layer's weights are gathered as it begins and dropped as it ends; on the way back it is computed again, so
they are gathered again. Gathering is part of the graph: going back leaves each process with its own part of
the gradient's sum. DeepSpeed's stage 3 cannot do it: in a pass it takes the gradient of a parameter once,
and trees in parts go back many times, one within the other. That all processes gather alike is `lockstep`'s.

Embeddings, the last norm and the output projection stay whole in each process.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from katcore.settings import ScaleSettings
from katcore.train import ranks
from katcore.train.lockstep import Lockstep


def scatter(model: Any, scale: ScaleSettings, *, beside: Any = None) -> "Scattered":
    """Leave this process its part of the weights of each layer, and move all else to where it computes.

    With `offload: all` the parts stay in main memory. Passes of a model `beside` a scattered one are made
    together with its.
    """
    device = ranks.device(scale.device)
    own = Scattered(model, device, on_cpu=scale.offload == "all")
    model.scattered = own
    model.to(device)
    (beside.lockstep if beside else Lockstep()).join(model)
    return own


def of(model: Any) -> "Scattered | None":
    """What `scatter` made of the model's layers, if it did."""
    found: Scattered | None = getattr(model, "scattered", None)
    return found


class Scattered:
    """The layers of a model."""

    def __init__(self, model: Any, device: torch.device, *, on_cpu: bool) -> None:
        self._model = model
        names = {module: name for name, module in model.named_modules()}
        place = torch.device("cpu") if on_cpu else device
        self._layers = [
            _Layer(layer, names[layer], device, place) for layer in model.base_model.layers
        ]

    @property
    def shards(self) -> list[nn.Parameter]:
        """What this process has of them."""
        return [part.shard for layer in self._layers for part in layer.parts]

    def gathered(self) -> dict[str, Tensor]:
        """Copies of their trained weights, in main memory; {} in all processes but the first."""
        parts = [part for layer in self._layers for part in layer.parts]
        found = [part.whole() for part in parts if part.shard.requires_grad]
        return {name: weight for whole in found for name, weight in whole.items()}

    def restore(self) -> None:
        """Make a plain model in main memory of it, in the first process, at the end."""
        for layer in self._layers:
            layer.restore()
        if ranks.rank() == 0:
            self._model.cpu()


class _Layer:
    """A layer whose weights are elsewhere, those apart that are trained, and those of each precision."""

    def __init__(self, layer: Any, name: str, device: torch.device, place: torch.device) -> None:
        self._layer = layer
        self._plain = layer.forward
        places = [
            (module, f"{name}.{above}.{own}" if above else f"{name}.{own}", parameter)
            for above, module in layer.named_modules()
            for own, parameter in module._parameters.items()
            if parameter is not None
        ]
        alike: dict[tuple[bool, torch.dtype], list[tuple[nn.Module, str, nn.Parameter]]] = {}
        for one in places:
            alike.setdefault((one[2].requires_grad, one[2].dtype), []).append(one)
        self.parts = [_Part(own, device, place) for own in alike.values()]
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
        """A plain layer again, in the first process."""
        for part in self.parts:
            part.keep()
        self._layer.forward = self._plain


def _again(layer: _Layer, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return layer.compute(*args, **kwargs)
    return checkpoint(layer.compute, *args, use_reentrant=False, **kwargs)


class _Part:
    """Parameters of a layer as one row of numbers, of which this process has a share."""

    def __init__(
        self,
        places: Sequence[tuple[nn.Module, str, nn.Parameter]],
        device: torch.device,
        place: torch.device,
    ) -> None:
        self._places = [(module, name) for module, name, _ in places]
        self._shapes = [parameter.shape for *_, parameter in places]
        self._device = device
        flat = torch.cat([parameter.detach().flatten() for *_, parameter in places])
        size = -(-len(flat) // ranks.world())
        flat = torch.nn.functional.pad(flat, (0, size * ranks.world() - len(flat)))
        own = flat[ranks.rank() * size :][:size].clone()
        self.shard = nn.Parameter(own.to(place), requires_grad=places[0][2].requires_grad)
        self.empty()

    def fill(self) -> None:
        """Give the layer its weights."""
        for (module, name), weight in zip(self._places, self._weights(), strict=True):
            module._parameters[_own(name)] = weight  # type: ignore[assignment]

    def empty(self) -> None:
        """Take them away."""
        for module, name in self._places:
            module._parameters[_own(name)] = None

    def whole(self) -> dict[str, Tensor]:
        """Copies in main memory, by name; {} in all processes but the first."""
        with torch.no_grad():
            weights = list(self._weights())
        if ranks.rank():
            return {}
        names = [name for _, name in self._places]
        return {
            name: weight.to("cpu", copy=True) for name, weight in zip(names, weights, strict=True)
        }

    def keep(self) -> None:
        """Give the layer of the first process its weights to keep."""
        found = self.whole()
        for module, name in self._places:
            if name in found:
                module._parameters[_own(name)] = nn.Parameter(found[name])

    def _weights(self) -> Iterator[Tensor]:
        flat: Tensor = _Gather.apply(self.shard, self._device)  # type: ignore[no-untyped-call]
        done = 0
        for shape in self._shapes:
            yield flat[done : done + shape.numel()].view(shape)
            done += shape.numel()


def _own(name: str) -> str:
    return name.rpartition(".")[2]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, device: torch.device) -> Tensor:
        ctx.place = shard.device
        if ranks.world() == 1:
            return shard.to(device, copy=True)
        own = shard.detach().to(device)
        flat = own.new_empty(len(own) * ranks.world())
        dist.all_gather_into_tensor(flat, own)
        return flat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        own = grad
        if ranks.world() > 1:
            own = grad.new_empty(len(grad) // ranks.world())
            dist.reduce_scatter_tensor(own, grad.contiguous())
        return own.to(ctx.place), None
