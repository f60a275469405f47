"""Models that are only looked at: teachers and references, on the batches of the one that is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train.batch import TreeBatch, collate
from katcore.train.layout import unrolled
from katcore.train.policy import hidden
from katcore.train.support import is_given_branches


def hidden_at(model: Any, batch: TreeBatch, samples: Sequence[Sample]) -> Tensor:
    """The last hidden states that predict the trained tokens of a batch of `samples`, (N, D).

    A model that cannot be given trees is given their branches, about as many tokens at a time.
    """
    with torch.no_grad():
        if batch.mask_BTT is not None and is_given_branches(model):
            return _of_branches(model, collate(samples, layout=unrolled), batch.ids_BT.numel())
        said = hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT)
        found: Tensor = said.last_hidden_state.flatten(0, 1)[batch.at_N]
        return found


def _of_branches(model: Any, batch: TreeBatch, max_tokens: int) -> Tensor:
    num_rows, length = batch.ids_BT.shape
    rows_N = batch.at_N // length
    at_once = max(1, max_tokens // length)
    chosen: list[Tensor] = []
    found: list[Tensor] = []
    for first in range(0, num_rows, at_once):
        chosen_M = ((first <= rows_N) & (rows_N < first + at_once)).nonzero()[:, 0]
        if len(chosen_M):
            rows = slice(first, first + at_once)
            said = hidden(model, batch.ids_BT[rows], batch.positions_BT[rows], None)
            places_M = batch.at_N[chosen_M] - first * length
            found.append(said.last_hidden_state.flatten(0, 1)[places_M])
            chosen.append(chosen_M)
    return torch.cat(found)[torch.cat(chosen).argsort()]
