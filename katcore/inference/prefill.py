"""Log-probabilities of ids that are there already, from a forward pass over the whole of them.

Requests wait in line and are computed together, as many as fit into a batch, in the order in which they came;
nothing is kept between them. So the same ids, asked for again in another order, meet other batch mates and
other padding, and what rounding there is falls differently.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import torch

from katcore.errors import EngineError, RequestError
from katcore.schema.call import Sampling, ScoreRequest

_MAX_TOKENS = 8192
"""Padded tokens of one batch."""


class Prefills:
    """Scores ids with a model, at most `max_rows` requests at a time, in a thread of `worker`."""

    def __init__(self, model: Any, worker: Executor, *, max_rows: int, context: int) -> None:
        self._model = model
        self._worker = worker
        self._max_rows = max_rows
        self._context = context
        self._waiting: list[tuple[ScoreRequest, asyncio.Future[tuple[float, ...]]]] = []
        self._loop: asyncio.Task[None] | None = None

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        """See `SupportsScore.score`."""
        sampling, places = request.sampling, request.places
        if len(request.ids) > self._context:
            raise RequestError(f"{len(request.ids)} ids > {self._context} maximum")
        if not places or places[0] < 1 or places[-1] >= len(request.ids):
            raise RequestError(f"places {places} are not in 1 .. {len(request.ids) - 1}")
        if sampling != Sampling(sampling.temperature, sampling.max_tokens, sampling.seed):
            raise RequestError("the embedded engine scores without cuts and penalties only")
        answer: asyncio.Future[tuple[float, ...]] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        return await answer

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        while self._waiting:
            batch = self._next()
            requests = [request for request, _ in batch]
            try:
                found = await loop.run_in_executor(self._worker, score, self._model, requests)
            except Exception as error:  # noqa: BLE001 - every waiting call has to be told
                failure = EngineError(f"the embedded engine failed: {error!r}")
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(failure)
                continue
            for (_, answer), values in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(values)

    def _next(self) -> list[tuple[ScoreRequest, asyncio.Future[tuple[float, ...]]]]:
        """The first in line that fit into a batch together."""
        longest, num = 0, 0
        for request, _ in self._waiting[: self._max_rows]:
            longest = max(longest, len(request.ids))
            if num and longest * (num + 1) > _MAX_TOKENS:
                break
            num += 1
        batch, self._waiting = self._waiting[:num], self._waiting[num:]
        return batch


def score(model: Any, requests: Sequence[ScoreRequest]) -> list[tuple[float, ...]]:
    """The log-probabilities that are asked for, from one forward pass over all the requests."""
    length = max(len(request.ids) for request in requests)
    ids_BT = torch.zeros(len(requests), length, dtype=torch.long)
    for row, request in enumerate(requests):
        ids_BT[row, : len(request.ids)] = torch.tensor(request.ids)
    pairs = [(row, place) for row, request in enumerate(requests) for place in request.places]
    rows_N, places_N = (torch.tensor(part, dtype=torch.long) for part in zip(*pairs, strict=True))
    heat_N = torch.tensor([requests[row].sampling.temperature or 1.0 for row, _ in pairs])
    later_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask_TT = torch.zeros(length, length, dtype=model.dtype)
    mask_TT.masked_fill_(later_TT, torch.finfo(model.dtype).min)
    place = model.device
    with torch.inference_mode():
        hidden_BTD = model.model(
            input_ids=ids_BT.to(place),
            position_ids=torch.arange(length, device=place).expand(len(requests), length),
            attention_mask=mask_TT.to(place).expand(len(requests), 1, length, length),
            use_cache=False,
        ).last_hidden_state
        logits_NV = model.lm_head(hidden_BTD[rows_N, places_N - 1]).float().cpu() / heat_N[:, None]
        chosen_N = logits_NV.gather(1, ids_BT[rows_N, places_N][:, None])[:, 0]
        found = iter((chosen_N - logits_NV.logsumexp(1)).tolist())
    return [tuple(next(found) for _ in request.places) for request in requests]
