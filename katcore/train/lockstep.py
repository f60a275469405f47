"""Passes through sharded layers, which all processes have to make together, whatever each has to compute.

Before each pass the processes say which way they would go. If one would go forwards, all do: those that would
not take a single token along, for nothing. Otherwise all go back, also with gradients of zero through such a
token. So at any time each has as many passes open, and none is left waiting in a layer.
"""

from typing import Any, Literal

import torch

from katcore.train import ranks

Way = Literal["look", "forward", "back"]
"""`look` is a forward pass that is not followed by one back."""
_ORDER: tuple[Way, ...] = ("look", "forward", "back")


class Lockstep:
    """The passes of one model."""

    def __init__(self, model: Any) -> None:
        self._model = model.base_model
        self._open: list[torch.Tensor] = []

    def turn(self, way: Way) -> None:
        """Wait until all go this way; goes the others' ways before, for nothing."""
        while (chosen := self._chosen(way)) and chosen != way:
            self._go(chosen)

    def finish(self) -> None:
        """Nothing is left to compute here: go the others' ways until that is so for all."""
        while chosen := self._chosen(None):
            self._go(chosen)

    def _chosen(self, way: Way | None) -> Way | None:
        ways = ranks.gathered(way)
        return next((one for one in _ORDER if one in ways), None)

    def _go(self, way: Way) -> None:
        if way == "back":
            hidden = self._open.pop()
            hidden.backward(torch.zeros_like(hidden))  # type: ignore[no-untyped-call]
            return
        ids = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
        with torch.set_grad_enabled(way == "forward"):
            found = self._model(input_ids=ids, use_cache=False).last_hidden_state
        if way == "forward":
            self._open.append(found)


def of(model: Any) -> Lockstep | None:
    """The model's, if its layers are sharded."""
    found: Lockstep | None = getattr(model, "lockstep", None)
    return found
