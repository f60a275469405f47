"""Passes through scattered layers, which all processes have to make together, whatever each has to compute.

Before each pass the processes say which way they would go, and of which model: the one that is trained, its
teachers, its reference. If one would go forwards, all do: those that would not take a single token along, for
nothing. Otherwise all go back, also with gradients of zero through such a token. So at any time each has as
many passes open, and none is left waiting in a layer.
"""

from typing import Any, Literal, NamedTuple

import torch

from katcore.train import ranks

Way = Literal["look", "forward", "back"]
"""`look` is a forward pass that is not followed by one back."""
_ORDER: tuple[Way, ...] = ("look", "forward", "back")


class _Turn(NamedTuple):
    """A way, by its place in the order, and a model, by its number. The least is taken first."""

    way: int
    model: int


class Lockstep:
    """The passes of all models that are scattered together."""

    def __init__(self) -> None:
        self._models: list[Any] = []
        self._open: list[torch.Tensor] = []

    def join(self, model: Any) -> None:
        """Have the passes of a model made in turn, too. All processes join the same models in one order."""
        self._models.append(model)
        model.lockstep = self

    def turn(self, model: Any, way: Way) -> None:
        """Wait until all go this way through the model; goes the others' ways before, for nothing."""
        own = _Turn(_ORDER.index(way), self._models.index(model))
        while (chosen := self._chosen(own)) and chosen != own:
            self._go(chosen)

    def finish(self) -> None:
        """Nothing is left to compute here: go the others' ways until that is so for all."""
        while chosen := self._chosen(None):
            self._go(chosen)

    def _chosen(self, own: _Turn | None) -> _Turn | None:
        return min((one for one in ranks.gathered(own) if one), default=None)

    def _go(self, turn: _Turn) -> None:
        way, model = _ORDER[turn.way], self._models[turn.model].base_model
        if way == "back":
            hidden = self._open.pop()
            hidden.backward(torch.zeros_like(hidden))  # type: ignore[no-untyped-call]
            return
        ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        with torch.set_grad_enabled(way == "forward"):
            found = model(input_ids=ids, use_cache=False).last_hidden_state
        if way == "forward":
            self._open.append(found)


def of(model: Any) -> Lockstep | None:
    """The model's, if its layers are scattered."""
    found: Lockstep | None = getattr(model, "lockstep", None)
    return found
