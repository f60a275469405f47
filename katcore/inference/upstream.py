"""Somebody else's model, by any API of OpenAI's or Anthropic's kind: text in, text out, no ids.

For evaluation, judges and demonstrations. What it says has origin `api`; RL and distillation take none of it.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

import anthropic
import openai

from katcore.errors import (
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    InfrastructureError,
    RequestError,
)
from katcore.schema.call import EngineRequest, Generation, Message, Sampling, Tool, ToolCall

_TIMEOUT_S = 900.0
_OVERFLOW = ("context_length_exceeded", "prompt is too long", "maximum context length")
_MAX_ANSWER = 32_000
"""Anthropic wants a limit, and refuses one beyond the model's."""
_Finish = Literal["stop", "length"]


class UpstreamEngine:
    """A model behind an API; `kind` says whose."""

    def __init__(
        self, kind: Literal["openai", "anthropic"], base_url: str | None, model: str, key: str
    ) -> None:
        given: Any = {"base_url": base_url, "api_key": key, "timeout": _TIMEOUT_S}
        self._client: Any
        # Over aiohttp: with hundreds of calls at once their own transport is what takes the time.
        if kind == "openai":
            http: Any = openai.DefaultAioHttpClient()
            self._client, self._ask = openai.AsyncOpenAI(**given, http_client=http), self._chat
        else:
            http = anthropic.DefaultAioHttpClient()
            self._client = anthropic.AsyncAnthropic(**given, http_client=http)
            self._ask = self._messages
        self._model = model

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """No ids: the tokens are the service's own affair."""
        return ()

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`."""
        try:
            return await self._ask(request)
        except (openai.APIError, anthropic.APIError) as error:
            raise _blamed(error) from error

    async def close(self) -> None:
        """See `SupportsClose.close`."""
        await self._client.close()

    async def _chat(self, request: EngineRequest) -> Generation:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [_chat_message(message) for message in request.messages],
            "max_completion_tokens": request.sampling.max_tokens,
            **_drawn(request.sampling),
        }
        if request.tools:
            body["tools"] = [
                {"type": "function", "function": _function(tool)} for tool in request.tools
            ]
        # Not by its own method for this, which takes each message apart to look for what it would rename.
        answer = await self._client.post(
            "/chat/completions", body=body, cast_to=openai.types.chat.ChatCompletion
        )
        choice = answer.choices[0]
        calls = tuple(
            ToolCall(call.id, call.function.name, call.function.arguments or "{}")
            for call in choice.message.tool_calls or ()
        )
        return self._generation(
            choice.message.content or "",
            getattr(choice.message, "reasoning_content", None) or "",
            calls,
            "length" if choice.finish_reason == "length" else "stop",
            (answer.usage.prompt_tokens, answer.usage.completion_tokens)
            if answer.usage
            else (0, 0),
        )

    async def _messages(self, request: EngineRequest) -> Generation:
        system = "\n".join(item.content for item in request.messages if item.role == "system")
        # Long answers are only given in a stream.
        async with self._client.messages.stream(
            model=self._model,
            system=system or anthropic.omit,
            messages=_turns([item for item in request.messages if item.role != "system"]),
            tools=[_anthropic_tool(tool) for tool in request.tools] or anthropic.omit,
            max_tokens=min(request.sampling.max_tokens, _MAX_ANSWER),
            extra_body=_drawn(request.sampling),
        ) as stream:
            answer = await stream.get_final_message()
        usage = answer.usage
        return self._generation(
            "".join(block.text for block in answer.content if block.type == "text"),
            "\n".join(block.thinking for block in answer.content if block.type == "thinking"),
            tuple(
                ToolCall(block.id, block.name, json.dumps(block.input))
                for block in answer.content
                if block.type == "tool_use"
            ),
            "length" if answer.stop_reason == "max_tokens" else "stop",
            (usage.input_tokens + (usage.cache_read_input_tokens or 0), usage.output_tokens),
        )

    def _generation(
        self,
        text: str,
        reasoning: str,
        calls: tuple[ToolCall, ...],
        finish: _Finish,
        usage: tuple[int, int],
    ) -> Generation:
        return Generation(
            (),
            (),
            text,
            finish,
            self._model,
            "api",
            reasoning=reasoning,
            tool_calls=calls,
            usage=usage,
        )


def _drawn(sampling: Sampling) -> dict[str, Any]:
    """Only what differs from the default: some models refuse to be told how to draw."""
    given: dict[str, Any] = {}
    if sampling.temperature != 1.0:
        given["temperature"] = sampling.temperature
    if sampling.top_p != 1.0:
        given["top_p"] = sampling.top_p
    return given


def _function(tool: Tool) -> dict[str, Any]:
    parameters = json.loads(tool.parameters)
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def _anthropic_tool(tool: Tool) -> dict[str, Any]:
    schema = json.loads(tool.parameters)
    return {"name": tool.name, "description": tool.description, "input_schema": schema}


def _chat_message(message: Message) -> dict[str, Any]:
    content: Any = message.content
    if message.images:
        content = [
            {"type": "text", "text": message.content},
            *({"type": "image_url", "image_url": {"url": url}} for url in message.images),
        ]
    entry: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        entry["tool_call_id"] = message.tool_call_id
    return entry


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Anthropic's messages: tool results are the user's, and neighbours of one role are one."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        if not turns or turns[-1]["role"] != role:
            turns.append({"role": role, "content": []})
        turns[-1]["content"] += _blocks(message)
    return [turn for turn in turns if turn["content"]]


def _blocks(message: Message) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = [_image(url) for url in message.images]
    if message.content.strip():
        blocks.insert(0, {"type": "text", "text": message.content})
    if message.role == "tool":
        return [
            {"type": "tool_result", "tool_use_id": message.tool_call_id, "content": blocks},
        ]
    return blocks + [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        for call in message.tool_calls
    ]


def _image(url: str) -> dict[str, Any]:
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def _blamed(error: Any) -> InfrastructureError | RequestError:
    status, said = getattr(error, "status_code", 0), str(error)
    if status == 429:
        wait = error.response.headers.get("retry-after", "5")
        return EngineBusyError(
            f"the service is busy: {said}", float(wait) if wait.isdecimal() else 5.0
        )
    if status in {400, 413} and any(mark in said for mark in _OVERFLOW):
        return ContextOverflowError(said)
    if status == 400:
        return RequestError(said)
    return EngineError(f"the service failed: {said}")
