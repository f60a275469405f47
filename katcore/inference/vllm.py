"""The vLLM engine: token ids in, token ids and their log-probabilities out, from a vLLM server.

It asks `/v1/completions`, which a server has without special flags, for answers to prompts of ids. Prompts
are rendered and answers read by the folder's tokenizer (`ChatTokenizer`), so that a conversation has the ids
it was sampled in. Log-probabilities are those of the distribution that was drawn from, which the server
proves before it is used (`vllm_probe`); greedy answers carry those at temperature 1, as the embedded engine's
do. Unlike there, penalties are known, and count in log-probabilities; and a number depends a little on what
else was in the batch, as it does with vLLM's kernels.
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from katcore.errors import ContextOverflowError, EngineError, EngineGoneError, RequestError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.vllm_http import Address, VllmClient
from katcore.inference.vllm_probe import NEUTRAL, Served, probe
from katcore.inference.vllm_weights import (
    add_adapter,
    is_adapter,
    remove_adapter,
    replace_weights,
    send_to_sleep,
)
from katcore.schema.call import (
    EngineRequest,
    Generation,
    Message,
    Sampling,
    ScoreRequest,
    Tool,
)

_COLDEST = 0.01
"""vLLM takes any temperature between 0 and this one for this one."""


class Server(Protocol):
    """Whatever keeps a vLLM server running."""

    async def ready(self, report: Callable[[str], None]) -> Address:
        """Where it answers now. Raises EngineError."""

    def runs(self) -> bool:
        """Whether it has been started, and has not ended."""

    def doubt(self, address: Address) -> str:
        """It did not answer there; returns what it said last."""

    async def close(self) -> None:
        """It is not needed any more."""


class Elsewhere:
    """A server that somebody else keeps running."""

    def __init__(self, url: str, key: str = "") -> None:
        self._address = Address(url, key)

    async def ready(self, report: Callable[[str], None]) -> Address:
        """See `Server.ready`."""
        return self._address

    def runs(self) -> bool:
        """See `Server.runs`."""
        return True

    def doubt(self, address: Address) -> str:
        """See `Server.doubt`."""
        return ""

    async def close(self) -> None:
        """See `Server.close`."""


class VllmEngine:
    """A model on a server. `model` is its name there, "" the only one; `context` bounds its length."""

    def __init__(
        self, server: Server, chat: ChatTokenizer, *, model: str = "", context: int | None = None
    ) -> None:
        self._server = server
        self._chat = chat
        self._model = model
        self._context = context
        self._report: Callable[[str], None] = lambda _: None
        self._address: Address | None = None
        self._client: VllmClient | None = None
        self._served: Served | None = None
        self.precision = ""
        """What the server computes in, as torch names it; "" if it does not say."""
        self._connecting = asyncio.Lock()
        self._wanted: tuple[Path, str] | None = None
        """The weights that were asked for last, and their version."""
        self._version = "0"
        self._adapter = ""
        self._adapters: Counter[str] = Counter()
        """Open calls of each adapter that the server has."""
        self._is_asleep = False
        self._fault = ""
        self._num_running = 0
        self._is_idle, self._is_open = asyncio.Event(), asyncio.Event()
        self._is_idle.set()
        self._is_open.set()
        self._loading = asyncio.Lock()

    async def open(self, report: Callable[[str], None]) -> None:
        """See `SupportsOpen.open`."""
        self._report = report
        await self._ready()

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._chat.encode(messages, tools=tools, start=start)

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """See `SupportsTokens.token_texts`."""
        return self._chat.token_texts(ids)

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`. A caller that is cancelled ends the work at the server."""
        if 0 < request.sampling.temperature < _COLDEST:
            raise RequestError(
                f"vLLM draws at no temperature between 0 (greedy) and {_COLDEST};"
                f" asked for {request.sampling.temperature:g}"
            )
        async with self._turn():
            client, served = await self._ready()
            num, version = len(request.prompt_ids), self._version
            if num >= served.context:
                raise ContextOverflowError(
                    f"prompt is too long: {num} tokens > {served.context - 1} maximum"
                )
            room = min(request.sampling.max_tokens, served.context - num)
            body = {
                "prompt": list(request.prompt_ids),
                "max_tokens": room,
                # Answers end at the ids that our templates know, and at no others.
                "ignore_eos": True,
                "stop_token_ids": sorted(self._chat.end_ids),
                "logprobs": 0,
                "return_token_ids": True,
                **_drawn(request.sampling),
            }
            answer = await self._complete(client, served, body)
        return self._generation(request, answer, version)

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        """See `SupportsScore.score`. The server reads no cache for it.

        vLLM's log-probabilities of prompts are the model's own, whatever the temperature.
        """
        sampling = request.sampling
        if sampling != Sampling(1.0, sampling.max_tokens, sampling.seed):
            raise RequestError(
                f"vLLM scores at temperature 1 without cuts and penalties only, asked for {sampling};"
                " sample so, or average the trainer's log-probabilities (mcla.place: trainer)"
            )
        async with self._turn():
            client, served = await self._ready()
            if len(request.ids) >= served.context:
                raise ContextOverflowError(
                    f"{len(request.ids)} ids > {served.context - 1} maximum: a server that scores has to draw"
                    " one more"
                )
            body = {
                "prompt": list(request.ids),
                "max_tokens": 1,
                "prompt_logprobs": 0,
                **_drawn(sampling),
            }
            answer = await self._complete(client, served, body)
        return _scored(answer, request)

    async def load_weights(self, folder: Path, version: str) -> None:
        """See `SupportsWeights.load_weights`. A server that was started again gets the weights again.

        Whole weights wait for what is being answered, and later calls wait for them; an adapter is served
        beside the one before, and nobody waits.
        """
        async with self._loading:
            if is_adapter(folder) and not self._is_asleep:
                await self._load(folder, version)
                return
            async with self._alone():
                await self._load(folder, version)

    async def sleep(self) -> None:
        """See `SupportsSleep.sleep`. Weights that the server can read again are not kept.

        A server that has ended is not started for it.
        """
        async with self._loading:
            if self._is_asleep or not self._server.runs():
                return
            async with self._alone():
                client, _ = await self._ready()
                keeps = self._wanted is None or bool(self._adapter)
                with self._noticing():
                    await send_to_sleep(client, keeps_weights=keeps)
                self._is_asleep = True

    async def close(self) -> None:
        """See `SupportsClose.close`."""
        if self._client is not None:
            await self._client.close()
        await self._server.close()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """While nobody is answered. Afterwards, calls go on unless the server sleeps well."""
        self._is_open.clear()
        try:
            await self._is_idle.wait()
            yield
        finally:
            if self._fault or not self._is_asleep:
                self._is_open.set()

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """While weights are exchanged, nobody asks; while somebody asks, no weights are exchanged."""
        while not self._is_open.is_set():
            await self._is_open.wait()
        if self._fault:
            raise EngineError(self._fault)
        self._num_running += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._is_idle.set()

    async def _ready(self) -> tuple[VllmClient, Served]:
        """The connection to a server that runs, has proven itself, and has the newest weights."""
        async with self._connecting:
            address = await self._server.ready(self._report)
            if self._client is None or address != self._address:
                if self._client is not None:
                    await self._client.close()
                self._client, self._address = VllmClient(address), address
                self._served = None
            if self._served is None:
                with self._noticing():
                    served = await probe(self._client, self._chat, self._model, self._context)
                # A server that was started again is awake, and has nothing of what the old one was given.
                self._is_asleep, self._adapter = False, ""
                self._adapters.clear()
                if self._wanted is not None:
                    await self._take(self._client, *self._wanted)
                self._served, self.precision = served, served.precision
            return self._client, self._served

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """A server that went away may come back as another one; the error has what it said last."""
        address = self._address
        try:
            yield
        except EngineGoneError as error:
            if address is None or address != self._address:
                raise
            self._served = None
            raise EngineGoneError(f"{error}{self._server.doubt(address)}") from error

    async def _complete(self, client: VllmClient, served: Served, body: dict[str, Any]) -> Any:
        adapter = self._adapter
        self._adapters[adapter] += 1
        try:
            with self._noticing():
                named = {"model": adapter or served.name, **body}
                return await client.call("/v1/completions", named)
        finally:
            self._adapters[adapter] -= 1

    async def _load(self, folder: Path, version: str) -> None:
        self._wanted = folder, version
        try:
            client, _ = await self._ready()
            await self._take(client, folder, version)
        except BaseException:
            self._fault = f"the server did not take the weights of {folder}"
            raise
        self._fault = ""

    async def _take(self, client: VllmClient, folder: Path, version: str) -> None:
        with self._noticing():
            if is_adapter(folder):
                name = f"{version}-{uuid.uuid4().hex[:8]}"
                await add_adapter(client, folder, name, is_asleep=self._is_asleep)
                self._adapter = name
                self._adapters[name] = 0
            else:
                await replace_weights(client, folder, is_asleep=self._is_asleep)
                self._adapter = ""
            self._version, self._is_asleep = version, False
            for old in [name for name, num in self._adapters.items() if name and not num]:
                if old != self._adapter:
                    del self._adapters[old]
                    await remove_adapter(client, old)

    def _generation(self, request: EngineRequest, answer: Any, version: str) -> Generation:
        ids, logprobs, reason = _checked(answer, request.prompt_ids)
        finish: Literal["stop", "length"]
        if ids[-1] in self._chat.end_ids:
            finish = "stop"
        elif reason == "length":
            finish = "length"
        else:
            raise EngineError(f"the server broke an answer off after {len(ids)} ids: {reason}")
        text, reasoning, calls = self._chat.read(ids, request.prompt_ids, request.tools)
        return Generation(
            ids, logprobs, text, finish, version, reasoning=reasoning, tool_calls=calls
        )


def _drawn(sampling: Sampling) -> dict[str, Any]:
    return NEUTRAL | {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
    }


def _scored(answer: Any, request: ScoreRequest) -> tuple[float, ...]:
    try:
        (choice,) = answer["choices"]
        shown = choice["prompt_logprobs"]
        if len(shown) != len(request.ids):
            raise EngineError(f"the server scored {len(shown)} ids of {len(request.ids)}")
        return tuple(
            float(shown[place][str(request.ids[place])]["logprob"]) for place in request.places
        )
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"vLLM gave no log-probabilities: {str(answer)[:300]}") from error


def _checked(
    answer: Any, prompt_ids: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """Ids, log-probabilities and the reason why it ended, of an answer that is whole."""
    try:
        (choice,) = answer["choices"]
        ids, asked = tuple(choice["token_ids"]), tuple(choice["prompt_token_ids"])
        logprobs = tuple(map(float, choice["logprobs"]["token_logprobs"]))
        reason = str(choice["finish_reason"])
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"not an answer of vLLM 0.11 or later: {str(answer)[:300]}") from error
    if asked != prompt_ids:
        raise EngineError("the server answered another prompt than it was asked")
    if not ids or len(ids) != len(logprobs):
        raise EngineError(f"the server gave {len(ids)} ids and {len(logprobs)} log-probabilities")
    return ids, logprobs, reason
