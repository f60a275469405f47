"""The Anthropic Messages dialect.

Wire format: https://docs.anthropic.com/en/api/messages. A system message may stand among the others, as newer
agents send it. Tools that the real service would run itself have no schema, and are not offered to the model.
`stop_sequences`, `tool_choice` and `thinking` are on record, but no engine is bound by them.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from katcore.proxy.dialect import COMMENT, Ask, Kind, Problem, Reply, Wire, server_sent, validated
from katcore.schema.call import Generation, Message, Sampling, Tool, ToolCall

_BILLING = "x-anthropic-billing-header:"
"""What begins a block of some agents' system prompt that changes from call to call, and says nothing."""
_SIGNATURE = "katcore"
_ERRORS: dict[Kind, str] = {
    "invalid": "invalid_request_error",
    "authentication": "authentication_error",
    "not-found": "not_found_error",
    "too-large": "request_too_large",
    "busy": "rate_limit_error",
    "context": "invalid_request_error",
    "budget": "invalid_request_error",
    "engine": "api_error",
    "proxy": "api_error",
}

PING = COMMENT


class _Text(Wire):
    type: Literal["text"]
    text: str


class _Source(Wire):
    type: Literal["base64", "url"]
    media_type: str = ""
    data: str = ""
    url: str = ""

    def link(self) -> str:
        return self.url or f"data:{self.media_type};base64,{self.data}"


class _Image(Wire):
    type: Literal["image"]
    source: _Source


class _ToolUse(Wire):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


_Said = Annotated[_Text | _Image, Field(discriminator="type")]


class _ToolResult(Wire):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[_Said] | None = None


class _Thinking(Wire):
    type: Literal["thinking"]
    thinking: str


class _Redacted(Wire):
    type: Literal["redacted_thinking"]


_Block = Annotated[
    _Text | _Image | _ToolUse | _ToolResult | _Thinking | _Redacted, Field(discriminator="type")
]


class _Message(Wire):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Block]


class _Tool(Wire):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class _Request(Wire):
    model: str
    max_tokens: int = Field(ge=1)
    messages: list[_Message] = Field(min_length=1)
    system: str | list[_Text] | None = None
    tools: list[_Tool] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = None


def parse(body: Mapping[str, Any]) -> Ask:
    """See `Dialect.parse`."""
    request = validated(_Request, body)
    messages = [message for given in request.messages for message in _messages(given)]
    system = _system(request.system)
    if system:
        messages.insert(0, Message("system", system))
    temperature = 1.0 if request.temperature is None else request.temperature
    return Ask(
        request.model,
        tuple(messages),
        tuple(
            Tool(tool.name, tool.description or "", orjson.dumps(tool.input_schema).decode())
            for tool in request.tools or ()
            if tool.input_schema is not None
        ),
        Sampling(
            temperature,
            request.max_tokens,
            top_p=request.top_p or 1.0,
            top_k=max(0, request.top_k or 0),
        ),
        bool(request.stream),
    )


def _system(given: str | list[_Text] | None) -> str:
    texts = [given] if isinstance(given, str) else [block.text for block in given or ()]
    return "\n".join(text for text in texts if not text.startswith(_BILLING))


def _messages(given: _Message) -> Iterator[Message]:
    """A message of the wire as records: each tool result is one of its own."""
    if isinstance(given.content, str):
        yield Message(given.role, given.content)
        return
    if given.role == "assistant":
        yield _assistant(given.content)
        return
    said: list[_Text | _Image] = []
    for block in given.content:
        if isinstance(block, _ToolResult):
            if said:
                yield _spoken(given.role, said)
                said = []
            yield _result(block)
        elif isinstance(block, _Text | _Image):
            said.append(block)
    if said or not given.content:
        yield _spoken(given.role, said)


def _spoken(role: Literal["user", "system", "assistant"], said: list[_Text | _Image]) -> Message:
    return Message(role, _text(said), images=_images(said))


def _result(block: _ToolResult) -> Message:
    said = [] if block.content is None or isinstance(block.content, str) else block.content
    text = block.content if isinstance(block.content, str) else _text(said)
    return Message("tool", text, tool_call_id=block.tool_use_id, images=_images(said))


def _assistant(blocks: list[Any]) -> Message:
    return Message(
        "assistant",
        _text(blocks),
        "\n".join(block.thinking for block in blocks if isinstance(block, _Thinking)),
        tuple(
            ToolCall(block.id, block.name, orjson.dumps(block.input).decode())
            for block in blocks
            if isinstance(block, _ToolUse)
        ),
    )


def _text(blocks: list[Any]) -> str:
    return "\n".join(block.text for block in blocks if isinstance(block, _Text))


def _images(blocks: list[Any]) -> tuple[str, ...]:
    return tuple(block.source.link() for block in blocks if isinstance(block, _Image))


def answer(reply: Reply) -> dict[str, Any]:
    """See `Dialect.answer`."""
    return {
        **_frame(reply),
        "content": list(_blocks(reply.generation)),
        "stop_reason": _stop_reason(reply.generation),
        "usage": _usage(reply, reply.num_sampled),
    }


def events(reply: Reply | Problem) -> Iterator[bytes]:
    """See `Dialect.events`."""
    if isinstance(reply, Problem):
        yield server_sent(problem(reply), "error")
        return
    begun = {**_frame(reply), "content": [], "stop_reason": None, "usage": _usage(reply, 0)}
    yield _event("message_start", message=begun)
    yield _event("ping")
    for index, block in enumerate(_blocks(reply.generation)):
        empty, deltas = _opened(block)
        yield _event("content_block_start", index=index, content_block=empty)
        for delta in deltas:
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    delta = {"stop_reason": _stop_reason(reply.generation), "stop_sequence": None}
    yield _event("message_delta", delta=delta, usage=_usage(reply, reply.num_sampled))
    yield _event("message_stop")


def problem(problem: Problem) -> dict[str, Any]:
    """See `Dialect.problem`."""
    return {"type": "error", "error": {"type": _ERRORS[problem.kind], "message": problem.message}}


def models(model: str) -> dict[str, Any]:
    """The list of models, which are one."""
    listed = [described(model)]
    return {"data": listed, "has_more": False, "first_id": model, "last_id": model}


def described(model: str) -> dict[str, Any]:
    """The model by itself."""
    return {
        "id": model,
        "type": "model",
        "display_name": model,
        "created_at": "1970-01-01T00:00:00Z",
    }


def _event(kind: str, **fields: Any) -> bytes:
    return server_sent({"type": kind, **fields}, kind)


def _blocks(made: Generation) -> Iterator[dict[str, Any]]:
    if made.reasoning:
        yield {"type": "thinking", "thinking": made.reasoning, "signature": _SIGNATURE}
    if made.text:
        yield {"type": "text", "text": made.text}
    for call in made.tool_calls:
        arguments = orjson.loads(call.arguments)
        yield {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _opened(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it begins, and the deltas that fill it."""
    if block["type"] == "thinking":
        return {**block, "thinking": "", "signature": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    if block["type"] == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
    arguments = orjson.dumps(block["input"]).decode()
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": arguments}]


def _stop_reason(made: Generation) -> str:
    if made.finish == "length":
        return "max_tokens"
    return "tool_use" if made.tool_calls else "end_turn"


def _frame(reply: Reply) -> dict[str, Any]:
    return {
        "id": f"msg_{reply.id}",
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "stop_sequence": None,
    }


def _usage(reply: Reply, num_sampled: int) -> dict[str, int]:
    return {
        "input_tokens": reply.num_prompt - reply.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reply.num_cached,
        "output_tokens": num_sampled,
    }
