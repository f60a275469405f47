"""The dialect of Google's Gemini API.

Wire format: https://ai.google.dev/api/generate-content, as v1 and v1beta. The model stands in the path, and
whether the answer is a stream; the server puts both into the body. Tools that the real service would run
itself are not offered to the model. `toolConfig`, `safetySettings` and `stopSequences` are on record, but
bind no engine. Calls of tools have ids here, as in newer releases; where a client leaves them out, results
are matched by name and order.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import orjson
from pydantic import ConfigDict, Field
from pydantic.alias_generators import to_camel

from katcore.proxy.dialect import (
    STATUS,
    UNLIMITED,
    Ask,
    Kind,
    Problem,
    Reply,
    Wire,
    server_sent,
    validated,
)
from katcore.schema.call import Generation, Message, Sampling, Tool, ToolCall

_STATUSES: dict[Kind, str] = {
    "invalid": "INVALID_ARGUMENT",
    "authentication": "UNAUTHENTICATED",
    "not-found": "NOT_FOUND",
    "too-large": "INVALID_ARGUMENT",
    "busy": "RESOURCE_EXHAUSTED",
    "context": "INVALID_ARGUMENT",
    "budget": "FAILED_PRECONDITION",
    "engine": "UNAVAILABLE",
    "proxy": "INTERNAL",
}
PING = b"\n"
"""Its clients take no comments."""
_RETRY = "type.googleapis.com/google.rpc.RetryInfo"


class _Camel(Wire):
    """Fields in either of the spellings that JSON of Protocol Buffers has."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True
    )


class _Blob(_Camel):
    mime_type: str = ""
    data: str


class _File(_Camel):
    file_uri: str


class _Called(_Camel):
    id: str = ""
    name: str
    args: dict[str, Any] | None = None


class _Result(_Camel):
    id: str = ""
    name: str
    response: dict[str, Any] | None = None


class _Part(_Camel):
    text: str | None = None
    thought: bool = False
    inline_data: _Blob | None = None
    file_data: _File | None = None
    function_call: _Called | None = None
    function_response: _Result | None = None

    @property
    def image(self) -> str:
        """A link, or ""."""
        if self.inline_data:
            # Some clients write the alphabet of URLs.
            data = self.inline_data.data.replace("-", "+").replace("_", "/")
            return f"data:{self.inline_data.mime_type};base64,{data}"
        return self.file_data.file_uri if self.file_data else ""


class _Content(_Camel):
    role: Literal["user", "model", "function"] = "user"
    parts: list[_Part] = Field(default=[])


class _Instruction(_Camel):
    """The system's text, whose role means nothing."""

    parts: list[_Part] = Field(default=[])


class _Function(_Camel):
    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    parameters_json_schema: dict[str, Any] | None = None


class _Tool(_Camel):
    function_declarations: list[_Function] | None = None


class _Generation(_Camel):
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: float | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    candidate_count: Literal[1] | None = None


class _Request(_Camel):
    model: str
    stream: bool = False
    contents: list[_Content] = Field(min_length=1)
    system_instruction: _Instruction | None = None
    tools: list[_Tool] | None = None
    generation_config: _Generation = _Generation()


def parse(body: Mapping[str, Any]) -> Ask:
    """See `Dialect.parse`."""
    request = validated(_Request, body)
    config = request.generation_config
    sampling = Sampling(
        1.0 if config.temperature is None else config.temperature,
        config.max_output_tokens or UNLIMITED,
        config.seed,
        config.top_p or 1.0,
        max(0, int(config.top_k or 0)),
        config.presence_penalty or 0.0,
        config.frequency_penalty or 0.0,
    )
    return Ask(
        request.model,
        tuple(_messages(request)),
        tuple(
            _offered(function)
            for tool in request.tools or ()
            for function in tool.function_declarations or ()
        ),
        sampling,
        request.stream,
    )


def _offered(function: _Function) -> Tool:
    schema = function.parameters_json_schema or _lowered(function.parameters or {})
    return Tool(function.name, function.description, orjson.dumps(schema).decode())


def _lowered(schema: Any) -> Any:
    """Google's form of a schema as JSON Schema: its names of types are in capitals."""
    if isinstance(schema, list):
        return [_lowered(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.lower() if key == "type" and isinstance(value, str) else _lowered(value)
        for key, value in schema.items()
    }


def _messages(request: _Request) -> Iterator[Message]:
    if request.system_instruction:
        yield Message("system", _text(request.system_instruction.parts))
    asked: list[ToolCall] = []
    num = 0
    for content in request.contents:
        if content.role == "model":
            calls = []
            for part in content.parts:
                if call := part.function_call:
                    num += 1
                    arguments = orjson.dumps(call.args or {}).decode()
                    calls.append(ToolCall(call.id or f"call_{num}", call.name, arguments))
            asked += calls
            thought = [part for part in content.parts if part.thought]
            said = [part for part in content.parts if not part.thought]
            yield Message("assistant", _text(said), _text(thought), tuple(calls))
        else:
            yield from _given(content.parts, asked)


def _given(parts: list[_Part], asked: list[ToolCall]) -> Iterator[Message]:
    """What a user or the tools say: each result is a message of its own, and takes its call off `asked`."""
    said: list[_Part] = []
    for part in parts:
        if part.function_response is None:
            said.append(part)
            continue
        if said:
            yield _spoken(said)
            said = []
        yield _result(part.function_response, asked)
    if said or not parts:
        yield _spoken(said)


def _result(result: _Result, asked: list[ToolCall]) -> Message:
    fits = (
        call for call in asked if (call.id == result.id if result.id else call.name == result.name)
    )
    call = next(fits, None)
    if call:
        asked.remove(call)
    response = result.response or {}
    only = response.get("output") if len(response) == 1 else None
    text = only if isinstance(only, str) else orjson.dumps(response).decode()
    return Message("tool", text, tool_call_id=call.id if call else result.id)


def _spoken(parts: list[_Part]) -> Message:
    return Message("user", _text(parts), images=tuple(part.image for part in parts if part.image))


def _text(parts: list[_Part]) -> str:
    return "".join(part.text or "" for part in parts)


def answer(reply: Reply) -> dict[str, Any]:
    """See `Dialect.answer`."""
    return _chunk(reply, list(_parts(reply.generation)), is_last=True)


def events(reply: Reply | Problem) -> Iterator[bytes]:
    """See `Dialect.events`."""
    if isinstance(reply, Problem):
        yield server_sent(problem(reply))
        return
    *before, last = _parts(reply.generation)
    for part in before:
        yield server_sent(_chunk(reply, [part], is_last=False))
    yield server_sent(_chunk(reply, [last], is_last=True))


def problem(problem: Problem) -> dict[str, Any]:
    """See `Dialect.problem`."""
    error: dict[str, Any] = {
        "code": STATUS[problem.kind],
        "message": problem.message,
        "status": _STATUSES[problem.kind],
    }
    if problem.retry_after_s is not None:
        error["details"] = [{"@type": _RETRY, "retryDelay": f"{problem.retry_after_s:g}s"}]
    return {"error": error}


def models(model: str) -> dict[str, Any]:
    """The list of models, which are one."""
    return {"models": [described(model)]}


def described(model: str) -> dict[str, Any]:
    """The model by itself."""
    methods = ["generateContent", "countTokens"]
    return {"name": f"models/{model}", "displayName": model, "supportedGenerationMethods": methods}


def _parts(made: Generation) -> Iterator[dict[str, Any]]:
    if made.reasoning:
        yield {"text": made.reasoning, "thought": True}
    if made.text or not made.tool_calls:
        yield {"text": made.text}
    for call in made.tool_calls:
        arguments = orjson.loads(call.arguments)
        yield {"functionCall": {"id": call.id, "name": call.name, "args": arguments}}


def _chunk(reply: Reply, parts: list[dict[str, Any]], *, is_last: bool) -> dict[str, Any]:
    candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": parts}}
    if is_last:
        candidate["finishReason"] = "MAX_TOKENS" if reply.generation.finish == "length" else "STOP"
    return {
        "responseId": reply.id,
        "modelVersion": reply.model,
        "candidates": [candidate],
        "usageMetadata": {
            "promptTokenCount": reply.num_prompt,
            "cachedContentTokenCount": reply.num_cached,
            "candidatesTokenCount": reply.num_sampled,
            "totalTokenCount": reply.num_prompt + reply.num_sampled,
        },
    }
