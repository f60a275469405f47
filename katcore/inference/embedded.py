"""The embedded engine: samples in this process, from the very weights that are being trained.

Requests of many sessions are decoded together (continuous batching): waiting prompts are filled in first,
then all active sequences take one token. A session keeps its keys and values between turns, so a turn costs
only its new tokens. Log-probabilities are those of the distribution that was sampled from (after
temperature); greedy answers carry those at temperature 1. Agreement with the training pass is proven in
tests/inference/test_embedded.py.
"""

import asyncio
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from katcore.errors import ContextOverflowError, EngineError, RequestError
from katcore.inference.cache import Recording, Slot, SlotCache
from katcore.inference.chat import ChatTokenizer
from katcore.inference.prefill import Prefills
from katcore.schema.call import (
    EngineRequest,
    Generation,
    Message,
    Sampling,
    ScoreRequest,
    Tool,
)
from katcore.trajectory.prefix import num_common

_MAX_MASK = 1 << 26
"""Elements of the attention mask of one forward pass: 256 MiB in float32."""


@dataclass(slots=True)
class _Active:
    """A request that is being served. `pending` are ids whose keys and values are not in the slot yet."""

    request: EngineRequest
    answer: asyncio.Future[Generation]
    slot: Slot
    pending: list[int]
    version: str
    random: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class EmbeddedEngine:
    """One model, `num_slots` conversations at a time; more requests wait for a slot.

    `recording` is told of the passes that sample, by slot and place.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatTokenizer,
        *,
        num_slots: int = 64,
        context: int = 1024,
        seed: int = 0,
        recording: Recording | None = None,
    ) -> None:
        self._model = model
        self._chat = chat
        self._context = context
        self._recording = recording
        self._cache = SlotCache(
            model.config, num_slots=num_slots, context=context, like=model.lm_head.weight
        )
        self._slots = [Slot(number) for number in range(num_slots)]
        self._clock = itertools.count(1)
        self._random = torch.Generator().manual_seed(seed)
        self._version = "0"
        self._waiting: list[tuple[EngineRequest, asyncio.Future[Generation]]] = []
        self._active: list[_Active] = []
        self._loop: asyncio.Task[None] | None = None
        self._copying = asyncio.Lock()
        threads = torch.get_num_threads()
        self._worker = ThreadPoolExecutor(1, "sampler", torch.set_num_threads, (threads,))
        self._prefills = Prefills(model, self._worker, max_rows=num_slots, context=context)

    def weights_changed(self, version: str) -> None:
        """Forget all keys and values, and sign what follows with `version`."""
        self._version = version
        for slot in self._slots:
            slot.ids = None

    async def copy_weights(self, weights: Mapping[str, Tensor], version: str) -> None:
        """Take over weights by their names in the model, and sign what follows with `version`.

        What is being answered is finished first, with the old weights; what comes later waits.
        """
        try:
            async with self._copying:
                if self._loop is not None:
                    await asyncio.wait({self._loop})
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._worker, _copy, weights, self._model)
                self.weights_changed(version)
        finally:
            self._start()

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._chat.encode(messages, tools=tools, start=start)

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """See `SupportsTokens.token_texts`."""
        return self._chat.token_texts(ids)

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        """See `SupportsScore.score`."""
        return await self._prefills.score(request)

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`."""
        num, sampling = len(request.prompt_ids), request.sampling
        if num >= self._context:
            raise ContextOverflowError(
                f"prompt is too long: {num} tokens > {self._context - 1} maximum"
            )
        if sampling.presence_penalty or sampling.frequency_penalty:
            raise RequestError("the embedded engine knows no presence or frequency penalty")
        answer: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._start()
        return await answer

    def _start(self) -> None:
        is_idle = self._loop is None or self._loop.done()
        if self._waiting and is_idle and not self._copying.locked():
            self._loop = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        while self._waiting or self._active:
            self._drop_cancelled()
            if not self._copying.locked():
                self._admit()
            elif not self._active:
                return
            try:
                await loop.run_in_executor(self._worker, self._step)
            except Exception as error:  # noqa: BLE001 - every waiting call has to be told
                self._fail(error)
            self._finish()

    def _admit(self) -> None:
        while self._waiting:
            request, answer = self._waiting[0]
            free = [slot for slot in self._slots if not slot.is_busy]
            if not free:
                return
            del self._waiting[0]
            own = [slot for slot in free if slot.session_id == request.session_id]
            slot = (
                own[0] if own else min(free, key=lambda slot: (slot.ids is not None, slot.used_at))
            )
            held = num_common(slot.ids or [], request.prompt_ids[:-1]) if own else 0
            slot.ids = list(request.prompt_ids[:held])
            slot.session_id, slot.is_busy, slot.used_at = (
                request.session_id,
                True,
                next(self._clock),
            )
            pending = list(request.prompt_ids[held:])
            seed = request.sampling.seed
            own_random = None if seed is None else torch.Generator().manual_seed(seed)
            self._active.append(_Active(request, answer, slot, pending, self._version, own_random))

    def _step(self) -> None:
        """Fill waiting prompts in, or take one token everywhere."""
        fresh = [item for item in self._active if len(item.pending) > 1]
        batch = fresh or self._active
        if not batch:
            return
        widths = self._widths(batch)
        with torch.inference_mode():
            logits_BV = self._fill(fresh, widths) if fresh else self._decode(batch)
            ended = [row for row, item in enumerate(batch) if widths[row] == len(item.pending)]
            tokens, logprobs = self._sample([batch[row] for row in ended], logits_BV[ended])
        for item, width in zip(batch, widths, strict=True):
            assert item.slot.ids is not None
            item.slot.ids += item.pending[:width]
            del item.pending[:width]
        for row, token, logprob in zip(ended, tokens, logprobs, strict=True):
            item = batch[row]
            item.pending = [token]
            item.ids.append(token)
            item.logprobs.append(logprob)

    def _widths(self, batch: list[_Active]) -> list[int]:
        """How many pending ids of each are taken at once: long prompts go in parts, for memory's sake."""
        length = max(len(item.slot.ids or ()) + len(item.pending) for item in batch)
        widest = max(1, _MAX_MASK // (len(batch) * length))
        return [min(len(item.pending), widest) for item in batch]

    def _fill(self, batch: list[_Active], widths: list[int]) -> Tensor:
        starts = [len(item.slot.ids or ()) for item in batch]
        width, length = max(widths), max(map(sum, zip(starts, widths, strict=True)))
        ids_BQ = torch.zeros(len(batch), width, dtype=torch.long)
        places_BQ = torch.full((len(batch), width), self._context)
        for row, (item, start) in enumerate(zip(batch, starts, strict=True)):
            ids_BQ[row, : widths[row]] = torch.tensor(item.pending[: widths[row]])
            places_BQ[row, : widths[row]] = torch.arange(start, start + widths[row])
        slots = [item.slot.number for item in batch]
        return self._forward(slots, ids_BQ, places_BQ, length, torch.tensor(widths) - 1)

    def _decode(self, batch: list[_Active]) -> Tensor:
        """Over all slots up to the highest active one: a view of the cache then needs no copy."""
        num = 1 + max(item.slot.number for item in batch)
        rows = [item.slot.number for item in batch]
        places = [len(item.slot.ids or ()) for item in batch]
        ids_BQ = torch.zeros(num, 1, dtype=torch.long)
        places_BQ = torch.full((num, 1), self._context)
        ids_BQ[rows, 0] = torch.tensor([item.pending[0] for item in batch])
        places_BQ[rows, 0] = torch.tensor(places)
        last_B = torch.zeros(num, dtype=torch.long)
        return self._forward(range(num), ids_BQ, places_BQ, max(places) + 1, last_B)[rows]

    def _forward(
        self, slots: Sequence[int], ids_BQ: Tensor, places_BQ: Tensor, length: int, last_B: Tensor
    ) -> Tensor:
        place = self._model.device
        ids_BQ, places_BQ = ids_BQ.to(place), places_BQ.to(place)
        self._cache.select(slots, places_BQ, length)
        seen_BQK = torch.arange(length, device=place) <= places_BQ[:, :, None]
        mask = torch.zeros(seen_BQK.shape, dtype=self._model.dtype, device=place)
        mask.masked_fill_(~seen_BQK, torch.finfo(self._model.dtype).min)
        with self._recording.at(slots, places_BQ) if self._recording else nullcontext():
            hidden_BQD = self._model.model(
                input_ids=ids_BQ,
                position_ids=places_BQ.clamp(max=self._context - 1),
                attention_mask=mask[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        hidden_BD = hidden_BQD[torch.arange(len(last_B)), last_B]
        return self._model.lm_head(hidden_BD).float().cpu()  # type: ignore[no-any-return]

    def _sample(self, batch: list[_Active], logits_BV: Tensor) -> tuple[list[int], list[float]]:
        temperatures = torch.tensor([item.request.sampling.temperature for item in batch])
        scale_B1 = torch.where(temperatures > 0, temperatures, 1.0)[:, None]
        logprobs_BV = (logits_BV / scale_B1).log_softmax(1)
        noise_BV = torch.empty_like(logprobs_BV).exponential_(generator=self._random)
        for row, item in enumerate(batch):
            sampling = item.request.sampling
            if sampling.temperature > 0 and (sampling.top_k or sampling.top_p < 1):
                logprobs_BV[row] = _cut(logprobs_BV[row], sampling)
            if item.random is not None:
                noise_BV[row].exponential_(generator=item.random)
        drawn_B = (logprobs_BV - noise_BV.log()).argmax(1)
        tokens_B = torch.where(temperatures > 0, drawn_B, logits_BV.argmax(1))
        chosen_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        return tokens_B.tolist(), chosen_B.tolist()

    def _finish(self) -> None:
        going = []
        for item in self._active:
            is_end = bool(item.ids) and item.ids[-1] in self._chat.end_ids
            room = min(
                item.request.sampling.max_tokens, self._context - len(item.request.prompt_ids)
            )
            if not is_end and len(item.ids) < room:
                going.append(item)
                continue
            item.slot.is_busy = False
            if self._recording:
                held = len(item.slot.ids or ())
                self._recording.keep(item.request.session_id, item.slot.number, held)
            if not item.answer.done():
                item.answer.set_result(self._generation(item, "stop" if is_end else "length"))
        self._active = going

    def _generation(self, item: _Active, finish: Literal["stop", "length"]) -> Generation:
        request, ids = item.request, tuple(item.ids)
        text, reasoning, calls = self._chat.read(ids, request.prompt_ids, request.tools)
        return Generation(
            ids,
            tuple(item.logprobs),
            text,
            finish,
            item.version,
            reasoning=reasoning,
            tool_calls=calls,
        )

    def _drop_cancelled(self) -> None:
        for item in self._active:
            if item.answer.cancelled():
                item.slot.is_busy, item.slot.ids = False, None
        self._active = [item for item in self._active if not item.answer.cancelled()]
        self._waiting = [item for item in self._waiting if not item[1].cancelled()]

    def _fail(self, error: Exception) -> None:
        failure = EngineError(f"the embedded engine failed: {error!r}")
        for item in self._active:
            item.slot.is_busy, item.slot.ids = False, None
            if not item.answer.done():
                item.answer.set_exception(failure)
        self._active = []


def open_engine(
    folder: Path,
    *,
    num_slots: int = 64,
    context: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> EmbeddedEngine:
    """An engine over the model of a folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    chat = ChatTokenizer(folder)
    return EmbeddedEngine(
        model.eval().to(device), chat, num_slots=num_slots, context=context, seed=seed
    )


def _copy(weights: Mapping[str, Tensor], target: Any) -> None:
    own = target.state_dict()
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def _cut(logprobs_V: Tensor, sampling: Sampling) -> Tensor:
    """The log-probabilities after top-k and then top-p, made to sum to one again."""
    ordered_V, order_V = logprobs_V.sort(descending=True)
    kept_V = torch.ones_like(ordered_V, dtype=torch.bool)
    if sampling.top_k:
        kept_V[sampling.top_k :] = False
    before_V = ordered_V.exp().where(kept_V, 0).cumsum(0).roll(1)
    before_V[0] = 0
    kept_V &= before_V < sampling.top_p * ordered_V.exp().where(kept_V, 0).sum()
    ordered_V[~kept_V] = -torch.inf
    return torch.empty_like(logprobs_V).scatter(0, order_V, ordered_V).log_softmax(0)
