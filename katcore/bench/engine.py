"""An engine of ids by HTTP, as training has it: it tokenises prompts, and reads answers from their ids."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import aiohttp
import orjson

from katcore.bench.exchange import answer_chunks
from katcore.errors import EngineError
from katcore.schema.call import EngineRequest, Generation, Message, Tool

if TYPE_CHECKING:
    from katcore.inference.chat import ChatTokenizer


class IdsEngine:
    """The mock as an engine of ids and log-probabilities."""

    def __init__(self, url: str, chat: "ChatTokenizer", http: aiohttp.ClientSession) -> None:
        self._url = url
        self._chat = chat
        self._http = http

    async def prepare(self, chunks: int) -> None:
        """Tell the mock the ids of its answer."""
        answer = Message("assistant", "".join(answer_chunks(chunks)))
        ids = self._chat.answer_ids(answer, ())
        async with self._http.put(f"{self._url}/answer_ids", data=orjson.dumps(ids)) as response:
            response.raise_for_status()

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._chat.encode(messages, tools=tools, start=start)

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`."""
        used = request.sampling
        asked = {
            "prompt": request.prompt_ids,
            "max_tokens": used.max_tokens,
            "temperature": used.temperature,
        }
        url = f"{self._url}/v1/completions"
        try:
            async with self._http.post(url, data=orjson.dumps(asked)) as response:
                response.raise_for_status()
                choice = orjson.loads(await response.read())["choices"][0]
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"the mock engine failed: {error!r}") from error
        ids = tuple(choice["token_ids"])
        text, reasoning, calls = self._chat.read(ids, request.prompt_ids, request.tools)
        return Generation(
            ids,
            tuple(choice["logprobs"]),
            text,
            choice["finish_reason"],
            "mock",
            reasoning=reasoning,
            tool_calls=calls,
        )
