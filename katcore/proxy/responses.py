"""The OpenAI Responses dialect.

Wire format: https://platform.openai.com/docs/api-reference/responses. Nothing is stored for the client: each
request brings its whole input. Only function tools are offered to the model; `tool_choice`, `reasoning` and
`text` are on record, but no engine is bound by them.
"""

import itertools
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

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
from katcore.schema.call import Generation, Message, Role, Sampling, Tool, ToolCall

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}

PING = COMMENT


class _Part(Wire):
    type: Literal["input_text", "output_text", "text", "input_image", "refusal"]
    text: str = ""
    refusal: str = ""
    image_url: str | None = None


class _Message(Wire):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def record(self) -> Message:
        return Message(_ROLES[self.role], _text(self.content), images=_images(self.content))


class _Call(Wire):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def record(self) -> Message:
        called = ToolCall(self.call_id, self.name, self.arguments)
        return Message("assistant", "", tool_calls=(called,))


class _Output(Wire):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[_Part]

    def record(self) -> Message:
        return Message(
            "tool", _text(self.output), tool_call_id=self.call_id, images=_images(self.output)
        )


class _Thought(Wire):
    text: str = ""


class _Reasoning(Wire):
    type: Literal["reasoning"]
    summary: tuple[_Thought, ...] = ()
    content: list[_Thought] | None = None

    def record(self) -> Message:
        thoughts = self.content or self.summary
        return Message("assistant", "", "\n".join(thought.text for thought in thoughts))


_Item = Annotated[_Message | _Call | _Output | _Reasoning, Field(discriminator="type")]


class _Tool(Wire):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Request(Wire):
    model: str
    input: str | list[_Item]
    instructions: str | None = None
    tools: list[_Tool] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_output_tokens: int | None = Field(default=None, ge=1)
    previous_response_id: None = None


def parse(body: Mapping[str, Any]) -> Ask:
    """See `Dialect.parse`."""
    request = validated(_Request, {**body, "input": _with_types(body.get("input"))})
    messages = [Message("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        messages.append(Message("user", request.input))
    else:
        messages += _joined(item.record() for item in request.input)
    temperature = 1.0 if request.temperature is None else request.temperature
    return Ask(
        request.model,
        tuple(messages),
        tuple(
            Tool(tool.name, tool.description or "", orjson.dumps(tool.parameters or {}).decode())
            for tool in request.tools or ()
            if tool.type == "function"
        ),
        Sampling(temperature, request.max_output_tokens or UNLIMITED, top_p=request.top_p or 1.0),
        bool(request.stream),
    )


def _with_types(items: Any) -> Any:
    """A message may come without its type."""
    if not isinstance(items, list):
        return items
    return [
        {"type": "message", **item} if isinstance(item, dict) and "role" in item else item
        for item in items
    ]


def _joined(messages: Iterator[Message]) -> Iterator[Message]:
    """What the assistant said, thought and called in a row is one message of it."""
    for is_assistant, run in itertools.groupby(messages, lambda item: item.role == "assistant"):
        if not is_assistant:
            yield from run
            continue
        whole = Message("assistant", "")
        for part in run:
            whole = replace(
                whole,
                content=whole.content + part.content,
                reasoning=whole.reasoning + part.reasoning,
                tool_calls=whole.tool_calls + part.tool_calls,
            )
        yield whole


def _text(content: str | list[_Part]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text or part.refusal for part in content if part.type != "input_image")


def _images(content: str | list[_Part]) -> tuple[str, ...]:
    parts = () if isinstance(content, str) else content
    return tuple(part.image_url for part in parts if part.image_url)


def answer(reply: Reply) -> dict[str, Any]:
    """See `Dialect.answer`."""
    is_cut = reply.generation.finish == "length"
    return {
        **_frame(reply, "incomplete" if is_cut else "completed"),
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": list(_items(reply)),
        "usage": _usage(reply),
    }


def events(reply: Reply | Problem) -> Iterator[bytes]:
    """See `Dialect.events`."""
    made = _failed(reply) if isinstance(reply, Problem) else _events(reply)
    for number, event in enumerate(made):
        yield server_sent({**event, "sequence_number": number}, event["type"])


def _events(reply: Reply) -> Iterator[dict[str, Any]]:
    begun = {**_frame(reply, "in_progress"), "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(_items(reply)):
        empty, inside = _opened(item)
        yield {"type": "response.output_item.added", "output_index": index, "item": empty}
        for event in inside:
            yield {**event, "output_index": index, "item_id": item["id"]}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    whole = answer(reply)
    yield {"type": f"response.{whole['status']}", "response": whole}


def _failed(reason: Problem) -> Iterator[dict[str, Any]]:
    nothing = Generation((), (), "", "stop", "")
    frame = _frame(Reply(uuid.uuid4().hex, "", time.time(), nothing, 0, 0, 0), "failed")
    error = problem(reason)["error"]
    frame |= {"output": [], "usage": None}
    yield {"type": "response.created", "response": {**frame, "status": "in_progress"}}
    failed = {**frame, "error": {"code": error["code"], "message": error["message"]}}
    yield {"type": "response.failed", "response": failed}


def _opened(item: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An item as it begins, and the events that fill it."""
    if item["type"] == "function_call":
        called = item["arguments"]
        kind = "response.function_call_arguments"
        return {**item, "arguments": "", "status": "in_progress"}, [
            {"type": f"{kind}.delta", "delta": called},
            {"type": f"{kind}.done", "arguments": called, "name": item["name"]},
        ]
    (part,) = item["content"]
    kind = "response.output_text" if item["type"] == "message" else "response.reasoning_text"
    at = {"content_index": 0}
    logprobs: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
    return {**item, "content": [], "status": "in_progress"}, [
        {"type": "response.content_part.added", **at, "part": {**part, "text": ""}},
        {"type": f"{kind}.delta", **at, "delta": part["text"], **logprobs},
        {"type": f"{kind}.done", **at, "text": part["text"], **logprobs},
        {"type": "response.content_part.done", **at, "part": part},
    ]


def _items(reply: Reply) -> Iterator[dict[str, Any]]:
    made: Generation = reply.generation
    done = {"status": "completed"}
    if made.reasoning:
        thought = {"type": "reasoning_text", "text": made.reasoning}
        item = {"id": f"rs_{reply.id}", "type": "reasoning", "summary": [], "content": [thought]}
        yield item | done
    if made.text:
        part = {"type": "output_text", "text": made.text, "annotations": [], "logprobs": []}
        item = {"id": f"msg_{reply.id}", "type": "message", "role": "assistant", "content": [part]}
        yield item | done
    for number, call in enumerate(made.tool_calls):
        yield {
            "id": f"fc_{reply.id}_{number}",
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
        } | done


def _frame(reply: Reply, status: str) -> dict[str, Any]:
    return {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": int(reply.created_s),
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": reply.model,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
    }


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.num_prompt,
        "input_tokens_details": {"cached_tokens": reply.num_cached},
        "output_tokens": reply.num_sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": reply.num_prompt + reply.num_sampled,
    }
