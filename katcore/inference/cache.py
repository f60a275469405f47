"""A key-value cache of fixed slots: one conversation each, kept between its turns."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class Slot:
    """One conversation's place. `ids` are those whose keys and values it holds."""

    number: int
    session_id: str = ""
    ids: list[int] | None = None
    is_busy: bool = False
    used_at: int = 0


class Recording(Protocol):
    """Writes down what an engine's passes do to each token, such as the experts that it was sent to."""

    def at(self, slots: Sequence[int], places_BQ: Tensor) -> AbstractContextManager[None]:
        """The pass inside is over `places_BQ` of `slots`; the last place is a bin, as in the cache."""

    def keep(self, name: str, slot: int, num: int) -> None:
        """The first `num` places of a slot are those of the session of that name, which has an answer now."""


class SlotCache:
    """Keys and values of all layers, (slots, heads, context + 1, head size); the last place is a bin.

    They are numbers as `like` has them, where that is.

    Passed to the model as its `past_key_values`; `select` says beforehand which slots and places the next
    forward pass reads and writes.
    """

    def __init__(self, config: Any, *, num_slots: int, context: int, like: Tensor) -> None:
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_slots, heads, context + 1, size)
        layers = config.num_hidden_layers
        self.context = context
        self._keys = [like.new_zeros(shape) for _ in range(layers)]
        self._values = [like.new_zeros(shape) for _ in range(layers)]
        self._slots_B = torch.zeros(1, dtype=torch.long)
        self._places_BQ = torch.zeros(1, 1, dtype=torch.long)
        self._length = 0
        self._is_prefix = False

    def select(self, slots: Sequence[int], places_BQ: Tensor, length: int) -> None:
        """The next pass writes `places_BQ` of `slots`, and reads their first `length` places."""
        self._slots_B = torch.tensor(slots, device=places_BQ.device)
        self._places_BQ = places_BQ
        self._length = length
        self._is_prefix = list(slots) == list(range(len(slots)))

    def update(
        self, keys_BHQD: Tensor, values_BHQD: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers: store the new, return all."""
        return (
            self._store(self._keys[layer], keys_BHQD),
            self._store(self._values[layer], values_BHQD),
        )

    def _store(self, cache: Tensor, new_BHQD: Tensor) -> Tensor:
        cache[self._slots_B[:, None], :, self._places_BQ] = new_BHQD.transpose(1, 2)
        if self._is_prefix:
            return cache[: len(self._slots_B), :, : self._length]
        return cache[:, :, : self._length][self._slots_B]
