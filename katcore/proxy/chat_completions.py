"""The OpenAI Chat Completions dialect: requests in, answers and errors out.

Wire format: https://platform.openai.com/docs/api-reference/chat.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from katcore.schema.call import Message, ModelCall, Sampling


class BadRequest(Exception):  # noqa: N818 - the client's error, not ours
    """The request is not one this dialect can serve; the message goes to the client."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def record(self) -> Message:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore")
    messages: list[_Message]
    stream: bool | None = None
    n: Literal[1] | None = None
    temperature: float | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = None


def parse(body: bytes) -> tuple[tuple[Message, ...], Sampling, bool]:
    """Messages, requested sampling, and whether the answer is to be streamed.

    Raises:
        BadRequest: not valid; says which field.
    """
    try:
        request = _Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "body"
        raise BadRequest(f"{field}: {first['msg']}") from error
    if not request.messages:
        raise BadRequest("messages: at least one is needed")
    limit = request.max_completion_tokens or request.max_tokens or 1 << 30
    messages = tuple(message.record() for message in request.messages)
    temperature = 1.0 if request.temperature is None else request.temperature
    return messages, Sampling(temperature, limit, request.seed), bool(request.stream)


def answer(call: ModelCall, model: str, num_prompt: int) -> dict[str, Any]:
    """The body of a whole answer."""
    num_sampled = len(call.generation.ids)
    return {
        "id": f"chatcmpl-{call.call_id}",
        "object": "chat.completion",
        "created": int(call.finished_s),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": call.generation.text},
                "finish_reason": call.generation.finish,
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_sampled,
            "total_tokens": num_prompt + num_sampled,
        },
    }


def events(call: ModelCall, model: str) -> Iterator[bytes]:
    """The server-sent events of a streamed answer. It is recorded as a whole before the first one."""
    frame = {
        "id": f"chatcmpl-{call.call_id}",
        "object": "chat.completion.chunk",
        "created": int(call.finished_s),
        "model": model,
    }
    deltas: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": call.generation.text}, None),
        ({}, call.generation.finish),
    ]
    for delta, finish in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        yield b"data: " + json.dumps({**frame, "choices": [choice]}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def error(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
