"""The official clients of each dialect, behind one face."""

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import anthropic
import openai
from google import genai
from google.genai import errors, types

from katcore.schema.rollout import ModelEndpoint

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

OPEN: list[Any] = []


@dataclass
class Said:
    """An answer in nobody's dialect, as a client understood it."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    stop: str = ""
    usage: tuple[int, int] = (0, 0)
    raw: Any = None


class _Lists:
    """What OpenAI's and Anthropic's clients have in common."""

    client: Any

    async def models(self) -> list[str]:
        return [model.id async for model in self.client.models.list()]

    async def model(self, name: str) -> str:
        return str((await self.client.models.retrieve(name)).id)


class Chat(_Lists):
    """OpenAI's client, Chat Completions."""

    name = "chat-completions"
    stops = ("stop", "tool_calls", "length")
    errors: Any = openai

    def __init__(self, endpoint: ModelEndpoint) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"{endpoint.base_url}/v1", api_key=endpoint.api_key, max_retries=0
        )
        OPEN.append(self.client.close)
        self.tools = [{"type": "function", "function": {"name": "bash", "parameters": SCHEMA}}]

    def image(self) -> Any:
        url = {"url": f"data:image/png;base64,{PIXEL}"}
        return {"role": "user", "content": [{"type": "image_url", "image_url": url}]}

    def echo(self, said: Said, *outputs: str) -> list[Any]:
        message = said.raw if isinstance(said.raw, dict) else said.raw.model_dump()
        results = [
            {"role": "tool", "tool_call_id": call[0], "content": text}
            for call, text in zip(said.calls, outputs, strict=True)
        ]
        return [message, *results]

    async def say(self, messages: list[Any], *, stream: bool = False, **more: Any) -> Said:
        create = self.client.chat.completions.create
        given = {"model": "policy", "messages": messages, **more}
        if stream:
            return await self._streamed(await create(stream=True, **given))
        answer = await create(**given)
        (choice,) = answer.choices
        usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
        return Said(
            choice.message.content or "",
            getattr(choice.message, "reasoning_content", ""),
            [
                (call.id, call.function.name, json.loads(call.function.arguments))
                for call in choice.message.tool_calls or ()
            ],
            choice.finish_reason,
            usage,
            choice.message,
        )

    async def _streamed(self, stream: Any) -> Said:
        said, calls = Said(), dict[int, list[str]]()
        async for chunk in stream:
            for choice in chunk.choices:
                said.text += choice.delta.content or ""
                said.reasoning += getattr(choice.delta, "reasoning_content", "") or ""
                for call in choice.delta.tool_calls or ():
                    whole = calls.setdefault(call.index, [call.id or "", "", ""])
                    whole[1] += call.function.name or ""
                    whole[2] += call.function.arguments or ""
                said.stop = choice.finish_reason or said.stop
            if chunk.usage:
                said.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        said.calls = [(key, name, json.loads(text)) for key, name, text in calls.values()]
        return said


class Responses(Chat):
    """OpenAI's client, Responses."""

    name = "responses"
    stops = ("completed", "completed", "incomplete")

    def __init__(self, endpoint: ModelEndpoint) -> None:
        super().__init__(endpoint)
        self.tools = [{"type": "function", "name": "bash", "parameters": SCHEMA, "strict": False}]

    def image(self) -> Any:
        url = f"data:image/png;base64,{PIXEL}"
        return {"role": "user", "content": [{"type": "input_image", "image_url": url}]}

    def echo(self, said: Said, *outputs: str) -> list[Any]:
        results = [
            {"type": "function_call_output", "call_id": call[0], "output": text}
            for call, text in zip(said.calls, outputs, strict=True)
        ]
        return [*(item.model_dump(exclude_none=True) for item in said.raw.output), *results]

    async def say(self, messages: list[Any], *, stream: bool = False, **more: Any) -> Said:
        given = {"model": "policy", "input": messages, **more}
        if "max_tokens" in given:
            given["max_output_tokens"] = given.pop("max_tokens")
        if stream:
            seen = [
                event async for event in await self.client.responses.create(stream=True, **given)
            ]
            answer = seen[-1].response
            if answer.status == "failed":
                raise openai.APIError(answer.error.message, None, body=None)  # type: ignore[arg-type]
            deltas = "".join(
                item.delta for item in seen if item.type == "response.output_text.delta"
            )
            assert deltas == answer.output_text
            assert [item.sequence_number for item in seen] == list(range(len(seen)))
        else:
            answer = await self.client.responses.create(**given)
        said = Said(answer.output_text, stop=answer.status, raw=answer)
        for item in answer.output:
            if item.type == "function_call":
                said.calls.append((item.call_id, item.name, json.loads(item.arguments)))
            elif item.type == "reasoning":
                said.reasoning = item.content[0].text
        said.usage = (answer.usage.input_tokens, answer.usage.output_tokens)
        return said


class Messages(_Lists):
    """Anthropic's client."""

    name = "anthropic-messages"
    stops = ("end_turn", "tool_use", "max_tokens")
    errors: Any = anthropic

    def __init__(self, endpoint: ModelEndpoint) -> None:
        self.client = anthropic.AsyncAnthropic(
            base_url=endpoint.base_url, auth_token=endpoint.api_key, api_key=None, max_retries=0
        )
        OPEN.append(self.client.close)
        self.tools = [{"name": "bash", "input_schema": SCHEMA}]

    def image(self) -> Any:
        source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
        return {"role": "user", "content": [{"type": "image", "source": source}]}

    def echo(self, said: Said, *outputs: str) -> list[Any]:
        results = [
            {"type": "tool_result", "tool_use_id": call[0], "content": text}
            for call, text in zip(said.calls, outputs, strict=True)
        ]
        content = [block.model_dump() for block in said.raw.content]
        return [{"role": "assistant", "content": content}, {"role": "user", "content": results}]

    async def say(self, messages: list[Any], *, stream: bool = False, **more: Any) -> Said:
        given = {"model": "policy", "max_tokens": 1000, "messages": messages, **more}
        if stream:
            async with self.client.messages.stream(**given) as events:
                deltas = "".join([text async for text in events.text_stream])
                answer = await events.get_final_message()
            assert deltas == "".join(block.text for block in answer.content if block.type == "text")
        else:
            answer = await self.client.messages.create(**given)
        said = Said(stop=answer.stop_reason, raw=answer)
        for block in answer.content:
            if block.type == "text":
                said.text += block.text
            elif block.type == "thinking":
                said.reasoning += block.thinking
            else:
                said.calls.append((block.id, block.name, block.input))
        usage = answer.usage
        said.usage = (usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens)
        return said


class GeminiErrors:
    """Google's errors, of which there are two, by the names that the others give them."""

    class APIError(Exception):
        def __init__(self, error: errors.APIError) -> None:
            super().__init__(error.message)
            self.status_code = error.code
            self.response: Any = error.response

    class APIStatusError(APIError):
        """An answer that is none."""

    class BadRequestError(APIStatusError):
        """400."""

    class AuthenticationError(APIStatusError):
        """401."""

    class NotFoundError(APIStatusError):
        """404."""

    class RateLimitError(APIStatusError):
        """429."""

    class InternalServerError(APIStatusError):
        """5xx."""

    @classmethod
    def of(cls, error: errors.APIError) -> Exception:
        named = {
            400: cls.BadRequestError,
            401: cls.AuthenticationError,
            404: cls.NotFoundError,
            429: cls.RateLimitError,
        }
        is_server = error.code >= 500
        return (
            cls.InternalServerError if is_server else named.get(error.code, cls.APIStatusError)
        )(error)


class Gemini:
    """Google's client."""

    name = "gemini"
    stops = ("STOP", "STOP", "MAX_TOKENS")
    errors: Any = GeminiErrors

    def __init__(self, endpoint: ModelEndpoint) -> None:
        options = types.HttpOptions(base_url=endpoint.base_url)
        self.client: Any = genai.Client(api_key=endpoint.api_key, http_options=options)
        OPEN.append(self.client.aio.aclose)
        declared = types.FunctionDeclaration(name="bash", parameters_json_schema=SCHEMA)
        self.tools = [types.Tool(function_declarations=[declared])]

    async def models(self) -> list[str]:
        return [model.display_name async for model in await self.client.aio.models.list()]

    async def model(self, name: str) -> str:
        try:
            return str((await self.client.aio.models.get(model=name)).display_name)
        except errors.APIError as error:
            raise GeminiErrors.of(error) from error

    def image(self) -> Any:
        data = {"mime_type": "image/png", "data": base64.b64decode(PIXEL)}
        return {"role": "user", "parts": [{"inline_data": data}]}

    def echo(self, said: Said, *outputs: str) -> list[Any]:
        results = [
            types.Part(
                function_response=types.FunctionResponse(
                    id=call[0], name=call[1], response={"output": text}
                )
            )
            for call, text in zip(said.calls, outputs, strict=True)
        ]
        return [said.raw, types.Content(role="user", parts=results)]

    async def say(
        self,
        messages: list[Any],
        *,
        stream: bool = False,
        model: str = "policy",
        max_tokens: int | None = None,
        tools: list[types.Tool] | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> Said:
        config = types.GenerateContentConfig(
            max_output_tokens=max_tokens,
            tools=tools,
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
            **(extra_body or {}),
        )
        contents = [
            types.Content(role=item["role"], parts=[types.Part(text=item["content"])])
            if isinstance(item, dict) and "content" in item
            else item
            for item in messages
        ]
        given: Any = {"model": model, "contents": contents, "config": config}
        create = self.client.aio.models
        try:
            if stream:
                chunks = [item async for item in await create.generate_content_stream(**given)]
            else:
                chunks = [await create.generate_content(**given)]
        except errors.APIError as error:
            raise GeminiErrors.of(error) from error
        return self._read(chunks)

    def _read(self, chunks: list[Any]) -> Said:
        parts = [part for chunk in chunks for part in chunk.candidates[0].content.parts]
        usage = chunks[-1].usage_metadata
        said = Said(raw=types.Content(role="model", parts=parts))
        said.stop = chunks[-1].candidates[0].finish_reason.value
        said.usage = (usage.prompt_token_count, usage.candidates_token_count)
        for part in parts:
            if part.function_call:
                said.calls.append(
                    (part.function_call.id, part.function_call.name, part.function_call.args)
                )
            elif part.thought:
                said.reasoning += part.text
            else:
                said.text += part.text
        return said
