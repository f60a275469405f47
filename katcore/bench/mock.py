"""The mock engine: an HTTP server that gives one fixed answer, and costs as little as it can.

Without a delay a stream is sent in one piece: the cheaper the engine, the more a proxy in front of it is seen
to cost. `/v1/completions` takes and gives ids, as engines do that are trained with.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from katcore.bench.exchange import MODEL, answer_chunks
from katcore.bench.process import serve_lines

_MAX_BODY = 64 << 20
_CUT_IDS = 6
_USAGE = {"prompt_tokens": 1024, "completion_tokens": 32, "total_tokens": 1056}


@dataclass(frozen=True, slots=True)
class MockSettings:
    """`delay_ms` is how long an answer takes; of every `cut_every` answers one lacks its end (0: none)."""

    chunks: int
    delay_ms: float
    cut_every: int


class Mock:
    """The server of a benchmark."""

    def __init__(self, settings: MockSettings) -> None:
        self._settings = settings
        self._delay_s = settings.delay_ms / 1000
        chunks = answer_chunks(settings.chunks)
        self._num_asked = 0
        self._ids: list[int] = []
        self._events = [_event({"role": "assistant", "content": ""}, None)]
        self._events += [_event({"content": chunk}, None) for chunk in chunks]
        self._events += [_event({}, "stop"), _usage_event(), b"data: [DONE]\n\n"]
        self._whole = _whole("".join(chunks))
        self._cut = _whole("".join(chunks[:-1]))

    async def start(self) -> str:
        """Listen; returns the URL."""
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_put("/answer_ids", self._take_ids)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        is_streamed = orjson.loads(await request.read()).get("stream")
        is_cut = self._is_cut()
        if not is_streamed:
            await asyncio.sleep(self._delay_s)
            return _json(self._cut if is_cut else self._whole)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        events = self._events[:-4] if is_cut else self._events
        if not self._delay_s:
            await response.write(b"".join(events))
            return response
        for event in events:
            await asyncio.sleep(self._delay_s / len(events))
            await response.write(event)
        return response

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        num_prompt = len(orjson.loads(await request.read())["prompt"])
        await asyncio.sleep(self._delay_s)
        ids = self._ids[:-_CUT_IDS] if self._is_cut() else self._ids
        logprobs = [-0.7310585786300049 / (at + 1) for at in range(len(ids))]
        choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": "stop"}
        usage = {"prompt_tokens": num_prompt, "completion_tokens": len(ids)}
        return _json(orjson.dumps({"choices": [choice], "usage": usage}))

    async def _take_ids(self, request: web.Request) -> web.StreamResponse:
        """The fixed answer in the ids of whoever asks: only they have the tokenizer."""
        self._ids = orjson.loads(await request.read())
        return _json(b"{}")

    def _is_cut(self) -> bool:
        self._num_asked += 1
        every = self._settings.cut_every
        return bool(every) and self._num_asked % every == 0


def _event(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return (
        b"data: " + orjson.dumps({**_frame("chat.completion.chunk"), "choices": [choice]}) + b"\n\n"
    )


def _usage_event() -> bytes:
    """What was used, as the client wants to know: a proxy that is not told would count for itself."""
    chunk = {**_frame("chat.completion.chunk"), "choices": [], "usage": _USAGE}
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _whole(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return orjson.dumps({**_frame("chat.completion"), "choices": [choice], "usage": _USAGE})


def _frame(kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-mock", "object": kind, "created": 1, "model": MODEL}


def _json(data: bytes) -> web.Response:
    return web.Response(body=data, content_type="application/json")


async def main() -> None:
    """Start with the settings of the first line; answer with the URL."""

    async def start(settings: dict[str, Any]) -> object:
        return {"url": await Mock(MockSettings(**settings)).start()}

    await serve_lines(start)


if __name__ == "__main__":
    asyncio.run(main())
