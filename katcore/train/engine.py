"""From samples and an objective to gradients: in one pass over a batch, or part by part for a large tree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train import head
from katcore.train.balance import balance_loss, masses
from katcore.train.batch import TreeBatch, Weighting, collate
from katcore.train.forest import heavy_first, renumbered
from katcore.train.layout import Layout, packed
from katcore.train.objective import Objective, is_separable
from katcore.train.policy import go_back, hidden
from katcore.train.relay import Ends, backward
from katcore.train.replay import Routes


@dataclass(frozen=True, slots=True)
class Engine:
    """Adds to a model's gradients.

    `balance` weighs the load-balancing loss of a mixture of experts. Batches have the layout that `collate`
    chooses, unless another is given. With `routes` the samples' tokens are sent to these experts (`replay`).
    """

    model: Any
    weighting: Weighting = "path"
    layout: Layout | None = None
    balance: float = 0.0
    routes: Routes | None = None

    def backward(self, samples: Sequence[Sample], objective: Objective, weight: float) -> float:
        """Those of the objective's loss / weight, in one pass; returns the loss."""
        batch = self.collate(samples)
        found = self.forward(batch)
        hidden_ND = found.last_hidden_state.flatten(0, 1)[batch.at_N]
        loss, grad_ND = head.backward(self.model, hidden_ND, batch, samples, objective, weight)
        tensors, grads = [hidden_ND], [grad_ND]
        if self.balance:
            share = self.balance * objective.weight(samples, self.weighting) / weight
            balance = share * balance_loss(*self.masses(found, batch.counts_P))
            tensors.append(balance)
            grads.append(torch.ones_like(balance))
            loss += float(balance.detach())
        go_back(self.model, found, tensors, grads)
        return loss

    def backward_in_parts(
        self, sample: Sample, objective: Objective, weight: float, max_tokens: int
    ) -> float:
        """The same, with the activations of `max_tokens` tokens at a time, or of the longest path.

        Unless the objective `is_separable` it costs a forward pass more: the loss of a token then may depend
        on all others, so it is computed first.
        """
        batch = collate([sample], self.weighting, packed, self.routes)
        parents = renumbered(sample.parents, heavy_first(sample.parents))
        if is_separable(objective) and not self.balance:
            parts = _Separable(self, batch, sample, objective, weight)
            backward(self.model, batch, parents, max_tokens, parts)
            return parts.loss
        given = _Given(self, batch, sample, objective, weight)
        backward(self.model, batch, parents, max_tokens, given, **self._options)
        return given.loss

    def collate(self, samples: Sequence[Sample]) -> TreeBatch:
        """A batch in the engine's layout."""
        return collate(samples, self.weighting, self.layout, self.routes)

    def forward(self, batch: TreeBatch) -> Any:
        """What the model says of a batch."""
        return hidden(
            self.model,
            batch.ids_BT,
            batch.positions_BT,
            batch.mask_BTT,
            routes_PLK=batch.routes_PLK,
            **self._options,
        )

    def masses(self, found: Any, counts_P: Tensor) -> tuple[Tensor, Tensor]:
        """See `balance.masses`."""
        return masses(found.router_logits, counts_P, self.model.config.num_experts_per_tok)

    @property
    def _options(self) -> dict[str, bool]:
        return {"output_router_logits": True} if self.balance else {}


class _Separable:
    """The loss of each part by itself."""

    def __init__(
        self,
        engine: Engine,
        batch: TreeBatch,
        sample: Sample,
        objective: Objective,
        weight: float,
    ) -> None:
        self.loss = 0.0
        self._engine, self._batch, self._sample = engine, batch, sample
        self._objective, self._weight = objective, weight

    def __call__(self, found: Any, at_T: Tensor) -> Ends:
        """See `relay.Loss`."""
        inside_P = torch.full((self._batch.ids_BT.numel(),), -1)
        inside_P[at_T] = torch.arange(len(at_T))
        inside_N = inside_P[self._batch.at_N]
        chosen_M = (inside_N >= 0).nonzero()[:, 0]
        if not len(chosen_M):
            return [], []
        hidden_MD = found.last_hidden_state[0, inside_N[chosen_M]]
        batch = self._batch.only(chosen_M)
        loss, grad_MD = head.backward(
            self._engine.model, hidden_MD, batch, [self._sample], self._objective, self._weight
        )
        self.loss += loss
        return [hidden_MD], [grad_MD]


class _Given:
    """The gradient of the whole loss for the last hidden states, from a pass that keeps no activations."""

    def __init__(
        self,
        engine: Engine,
        batch: TreeBatch,
        sample: Sample,
        objective: Objective,
        weight: float,
    ) -> None:
        self._engine, self._batch = engine, batch
        with torch.no_grad():
            found = engine.forward(batch)
            hidden_TD = found.last_hidden_state[0]
            hidden_ND = hidden_TD[batch.at_N]
        self.loss, grad_ND = head.backward(
            engine.model, hidden_ND, batch, [sample], objective, weight
        )
        self._grad_TD = torch.zeros_like(hidden_TD).index_add(
            0, batch.at_N.to(hidden_TD.device), grad_ND
        )
        if engine.balance:
            share = engine.balance * objective.weight([sample], engine.weighting) / weight
            chosen_E, mass_E = engine.masses(found, batch.counts_P)
            balance = share * balance_loss(chosen_E, mass_E.requires_grad_())
            (self._grad_E,) = torch.autograd.grad(balance, mass_E)
            self.loss += float(balance.detach())

    def __call__(self, found: Any, at_T: Tensor) -> Ends:
        """See `relay.Loss`."""
        tensors = [found.last_hidden_state]
        grads = [self._grad_TD[None, at_T]]
        if self._engine.balance:
            tensors.append(self._engine.masses(found, self._batch.counts_P[at_T])[1])
            grads.append(self._grad_E)
        return tensors, grads
