"""Router replay: training sends each token to the experts that the engine sent it to when it sampled.

R3 (Rollout Routing Replay, arXiv 2510.11370). Only the choice is replayed. What a chosen expert's answer
weighs is computed from the trainer's own router, so gradients flow through the weights of the experts that
were chosen and into the router, as they do without replay. Tokens without a record choose for themselves.

Routers are those of transformers' mixtures of experts, unmodified: modules whose class is named
...TopKRouter and which give (logits, weights, experts). Proven in tests/train/test_replay.py.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from katcore.errors import StageError

Routes = Mapping[str, Tensor]
"""By rollout id (R, L, K): the K experts that each of L routers chose for the first R tokens of a sample."""
NONE = -1
"""In place of an expert where no choice was recorded."""

_Output = tuple[Tensor, Tensor, Tensor]


def routers(model: Any) -> list[Any]:
    """The routers of a model, in order of its layers.

    Raises:
        StageError: it has none that we know.
    """
    found = [
        module for module in model.modules() if re.search(r"Top[kK]Router$", type(module).__name__)
    ]
    if not found:
        raise StageError(
            f"{type(model).__name__} has no router whose choice could be replayed: its class would be named"
            " ...TopKRouter; train it without router replay"
        )
    return found


@contextmanager
def following(model: Any, routes_PLK: Tensor) -> Iterator[None]:
    """Forward passes inside take these experts for their P tokens.

    Raises:
        StageError: layers are computed again on the way back, where routers would choose for themselves; or
            routers weigh experts in another way than by softmax.
    """
    # Both `prepare.recompute` and `scattered` put a forward of their own in place of the layer's.
    if torch.is_grad_enabled() and any("forward" in vars(x) for x in model.base_model.layers):
        raise StageError(
            "router replay needs layers that are computed once: set scale.recompute: false and scale.zero"
            " to 2 or less"
        )
    with ExitStack() as stack:
        for layer, router in enumerate(routers(model)):
            hook = functools.partial(_replay, routes_PLK[:, layer].to(model.device))
            stack.callback(router.register_forward_hook(hook).remove)
        yield


class Recorder:
    """What routers choose in the passes of an engine, by slot and place, as its cache has keys and values.

    See `inference.cache.Recording`.
    """

    def __init__(self, model: Any, *, num_slots: int, context: int) -> None:
        found = routers(model)
        shape = (num_slots, context + 1, len(found), found[0].top_k)
        self._held_SCLK = torch.full(shape, NONE, dtype=torch.int16)
        self._rows: tuple[Tensor, Tensor] | None = None
        self._kept: dict[str, Tensor] = {}
        for layer, router in enumerate(found):
            router.register_forward_hook(functools.partial(self._store, layer))

    @contextmanager
    def at(self, slots: Sequence[int], places_BQ: Tensor) -> Iterator[None]:
        """The pass inside is over `places_BQ` of `slots`."""
        self._rows = torch.tensor(slots)[:, None], places_BQ.cpu()
        try:
            yield
        finally:
            self._rows = None

    def keep(self, name: str, slot: int, num: int) -> None:
        """The first `num` places of a slot belong to a sample of that name."""
        self._kept[name] = self._held_SCLK[slot, :num].clone()

    def take(self) -> dict[str, Tensor]:
        """What was kept since the last time, as `Routes`."""
        kept, self._kept = self._kept, {}
        return kept

    def _store(self, layer: int, _module: Any, _given: Any, output: _Output) -> None:
        if self._rows is not None:
            slots_B1, places_BQ = self._rows
            chosen_BQK = output[2].view(*places_BQ.shape, -1)
            self._held_SCLK[slots_B1, places_BQ, layer] = chosen_BQK.to("cpu", torch.int16)


def _replay(routes_PK: Tensor, router: Any, _given: Any, output: _Output) -> _Output:
    logits_PE, weights_PK, own_PK = output
    weigh = functools.partial(_weights, router, logits_PE, weights_PK.dtype)
    if float((weigh(own_PK) - weights_PK).detach().abs().max()) > 1e-5:
        raise StageError(
            f"{type(router).__name__} does not weigh experts by the softmax of its logits, so it is not known"
            " what replayed ones weigh; train the model without router replay"
        )
    chosen_PK = torch.where(routes_PK >= 0, routes_PK.to(own_PK), own_PK)
    return logits_PE, weigh(chosen_PK), chosen_PK


def _weights(router: Any, logits_PE: Tensor, dtype: torch.dtype, chosen_PK: Tensor) -> Tensor:
    """What the experts weigh: by the softmax over all, made to sum to one if the router does so."""
    exact = torch.promote_types(logits_PE.dtype, torch.float32)
    weights_PK = logits_PE.softmax(-1, dtype=exact).gather(1, chosen_PK)
    if getattr(router, "norm_topk_prob", True):
        weights_PK = weights_PK / weights_PK.sum(-1, keepdim=True)
    return weights_PK.to(dtype)
