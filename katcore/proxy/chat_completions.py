"""The OpenAI Chat Completions dialect.

Wire format: https://platform.openai.com/docs/api-reference/chat. Reasoning goes by `reasoning_content`, as
open models are served. `stop`, `tool_choice` and `response_format` are on record, but bind no engine.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import orjson
from pydantic import Field

from katcore.proxy.dialect import (
    COMMENT,
    UNLIMITED,
    Ask,
    Problem,
    Reply,
    Wire,
    server_sent,
    validated,
)
from katcore.proxy.openai import problem as problem
from katcore.schema.call import Generation, Message, Sampling, Tool, ToolCall

PING = COMMENT


class _Url(Wire):
    url: str


class _Part(Wire):
    type: Literal["text", "image_url", "refusal"]
    text: str = ""
    refusal: str = ""
    image_url: _Url | None = None


class _Called(Wire):
    name: str
    arguments: str = ""


class _ToolCall(Wire):
    id: str = ""
    type: Literal["function"] = "function"
    function: _Called


class _Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str = ""

    def record(self) -> Message:
        parts = self.content if isinstance(self.content, list) else ()
        text = self.content if isinstance(self.content, str) else ""
        return Message(
            "system" if self.role == "developer" else self.role,
            text or "".join(part.text or part.refusal for part in parts if not part.image_url),
            self.reasoning_content or "",
            tuple(
                ToolCall(call.id, call.function.name, call.function.arguments)
                for call in self.tool_calls or ()
            ),
            self.tool_call_id,
            tuple(part.image_url.url for part in parts if part.image_url),
        )


class _Function(Wire):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(Wire):
    type: Literal["function"]
    function: _Function


class _StreamOptions(Wire):
    include_usage: bool | None = None


class _Request(Wire):
    model: str
    messages: list[_Message] = Field(min_length=1)
    tools: list[_Tool] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None


def parse(body: Mapping[str, Any]) -> Ask:
    """See `Dialect.parse`."""
    request = validated(_Request, body)
    sampling = Sampling(
        1.0 if request.temperature is None else request.temperature,
        request.max_completion_tokens or request.max_tokens or UNLIMITED,
        request.seed,
        request.top_p or 1.0,
        max(0, request.top_k or 0),
        request.presence_penalty or 0.0,
        request.frequency_penalty or 0.0,
    )
    return Ask(
        request.model,
        tuple(message.record() for message in request.messages),
        tuple(
            Tool(
                tool.function.name,
                tool.function.description or "",
                orjson.dumps(tool.function.parameters or {}).decode(),
            )
            for tool in request.tools or ()
        ),
        sampling,
        bool(request.stream),
        bool(request.stream_options and request.stream_options.include_usage),
    )


def answer(reply: Reply) -> dict[str, Any]:
    """See `Dialect.answer`."""
    made = reply.generation
    message: dict[str, Any] = {"role": "assistant", "content": made.text}
    if made.reasoning:
        message["reasoning_content"] = made.reasoning
    if made.tool_calls:
        message["content"] = made.text or None
        message["tool_calls"] = [_called(call) for call in made.tool_calls]
    choice = {"index": 0, "message": message, "finish_reason": _finish(made), "logprobs": None}
    return {**_frame(reply, "chat.completion"), "choices": [choice], "usage": _usage(reply)}


def events(reply: Reply | Problem) -> Iterator[bytes]:
    """See `Dialect.events`."""
    if isinstance(reply, Problem):
        yield server_sent(problem(reply))
        return
    frame = _frame(reply, "chat.completion.chunk")
    for delta in _deltas(reply.generation):
        yield server_sent({**frame, "choices": [_choice(delta, None)]})
    yield server_sent({**frame, "choices": [_choice({}, _finish(reply.generation))]})
    if reply.has_usage:
        yield server_sent({**frame, "choices": [], "usage": _usage(reply)})
    yield b"data: [DONE]\n\n"


def models(model: str) -> dict[str, Any]:
    """The list of models, which are one."""
    return {"object": "list", "data": [described(model)]}


def described(model: str) -> dict[str, Any]:
    """The model by itself."""
    return {"id": model, "object": "model", "created": 0, "owned_by": "katcore"}


def _deltas(made: Generation) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": ""}
    if made.reasoning:
        yield {"reasoning_content": made.reasoning}
    if made.text:
        yield {"content": made.text}
    for index, call in enumerate(made.tool_calls):
        whole = _called(call)
        begun = {**whole, "index": index, "function": {"name": call.name, "arguments": ""}}
        yield {"tool_calls": [begun]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]}


def _choice(delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}


def _called(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _finish(made: Generation) -> str:
    return "tool_calls" if made.tool_calls and made.finish == "stop" else made.finish


def _frame(reply: Reply, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{reply.id}",
        "object": kind,
        "created": int(reply.created_s),
        "model": reply.model,
    }


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "prompt_tokens": reply.num_prompt,
        "completion_tokens": reply.num_sampled,
        "total_tokens": reply.num_prompt + reply.num_sampled,
        "prompt_tokens_details": {"cached_tokens": reply.num_cached},
    }
