"""The three dialects, as the official clients see them: whole and streamed answers, tools, errors."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from katcore.errors import ContextOverflowError, EngineBusyError, EngineError, RequestError
from katcore.proxy import server
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, Session, SessionSpec
from katcore.schema.call import Message, ModelCall, Sampling, ToolCall
from katcore.schema.rollout import ModelEndpoint
from katcore.trajectory.calls import read_calls, read_failures
from tests.proxy.fakes import FakeEngine

SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
LS = ToolCall("call_a", "bash", '{"command": "ls"}')
CAT = ToolCall("call_b", "bash", '{"command": "cat é"}')


_OPEN: list[Any] = []


@dataclass
class Said:
    """An answer in nobody's dialect, as a client understood it."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    stop: str = ""
    usage: tuple[int, int] = (0, 0)
    raw: Any = None


class Chat:
    """OpenAI's client, Chat Completions."""

    name = "chat-completions"
    stops = ("stop", "tool_calls", "length")
    errors: Any = openai

    def __init__(self, endpoint: ModelEndpoint) -> None:
        self.client: Any = openai.AsyncOpenAI(
            base_url=f"{endpoint.base_url}/v1", api_key=endpoint.api_key, max_retries=0
        )
        _OPEN.append(self.client)
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


class Messages:
    """Anthropic's client."""

    name = "anthropic-messages"
    stops = ("end_turn", "tool_use", "max_tokens")
    errors: Any = anthropic

    def __init__(self, endpoint: ModelEndpoint) -> None:
        self.client: Any = anthropic.AsyncAnthropic(
            base_url=endpoint.base_url, auth_token=endpoint.api_key, api_key=None, max_retries=0
        )
        _OPEN.append(self.client)
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


CLIENTS: list[Any] = [Chat, Responses, Messages]
USER = {"role": "user", "content": "hi"}


@dataclass
class Setting:
    """A proxy, and a session opened in it."""

    proxy: Proxy
    log: Path

    def open(self, engine: FakeEngine, **spec: Any) -> tuple[Session, ModelEndpoint]:
        given = {"sampling": Sampling(max_tokens=100)} | spec
        return self.proxy.open(SessionSpec("s1", engine, **given))

    @property
    def calls(self) -> list[ModelCall]:
        return list(read_calls(self.log))


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    async with Proxy(tmp_path / "calls.jsonl") as proxy:
        yield Setting(proxy, tmp_path / "calls.jsonl")
    while _OPEN:
        await _OPEN.pop().close()


@pytest.fixture(params=CLIENTS, ids=[client.name for client in CLIENTS])
def dialect(request: pytest.FixtureRequest) -> Any:
    return request.param


STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@STREAMED
async def test_text(setting: Setting, dialect: Any, *, stream: bool) -> None:
    _, endpoint = setting.open(FakeEngine("héllo"))
    said = await dialect(endpoint).say([USER], stream=stream)
    assert (said.text, said.calls, said.stop) == ("héllo", [], dialect.stops[0])
    if not (stream and dialect is Chat):
        assert said.usage == (5, 6)
    (call,) = setting.calls
    assert (call.dialect, call.generation.text) == (dialect.name, "héllo")


@STREAMED
async def test_tool_calls_side_by_side(setting: Setting, dialect: Any, *, stream: bool) -> None:
    engine = FakeEngine(Message("assistant", "Look:", tool_calls=(LS, CAT)))
    _, endpoint = setting.open(engine)
    client = dialect(endpoint)
    said = await client.say([USER], stream=stream, tools=client.tools)
    assert said.text == "Look:"
    assert said.calls == [
        ("call_a", "bash", {"command": "ls"}),
        ("call_b", "bash", {"command": "cat é"}),
    ]
    assert said.stop == dialect.stops[1]
    (tool,) = engine.requests[0].tools
    assert (tool.name, json.loads(tool.parameters)) == ("bash", SCHEMA)
    assert setting.calls[0].tools == (tool,)


@STREAMED
async def test_reasoning(setting: Setting, dialect: Any, *, stream: bool) -> None:
    _, endpoint = setting.open(FakeEngine(Message("assistant", "42", reasoning="hm, 6 x 7")))
    said = await dialect(endpoint).say([USER], stream=stream)
    assert (said.text, said.reasoning) == ("42", "hm, 6 x 7")


@STREAMED
async def test_a_cut_answer(setting: Setting, dialect: Any, *, stream: bool) -> None:
    _, endpoint = setting.open(FakeEngine("hel", finish="length"))
    said = await dialect(endpoint).say([USER], stream=stream, max_tokens=3)
    assert (said.text, said.stop) == ("hel", dialect.stops[2])
    assert setting.calls[0].requested.max_tokens == 3


async def test_a_conversation_with_tools_goes_on_from_the_ids(
    setting: Setting, dialect: Any
) -> None:
    asked = Message("assistant", "", "I wonder", tool_calls=(LS, CAT))
    engine = FakeEngine(asked, Message("assistant", "So.", tool_calls=(LS,)), "done")
    _, endpoint = setting.open(engine)
    client = dialect(endpoint)
    history = [USER]
    for outputs in (("a", "b"), ("c",)):
        said = await client.say(history, tools=client.tools)
        history += client.echo(said, *outputs)
    assert (await client.say(history, tools=client.tools)).text == "done"
    first, second, third = setting.calls
    assert [call.is_exact for call in (first, second, third)] == [True] * 3
    assert (second.parent, second.num_shared) == (first.call_id, first.num_ids)
    assert (third.parent, third.num_shared) == (second.call_id, second.num_ids)
    assert [message.role for message in second.new_messages] == ["tool", "tool"]
    assert [message.content for message in second.new_messages] == ["a", "b"]
    assert [message.tool_call_id for message in second.new_messages] == ["call_a", "call_b"]
    assert third.generation.text == "done"


async def test_an_image_is_passed_through(setting: Setting, dialect: Any) -> None:
    engine = FakeEngine()
    _, endpoint = setting.open(engine)
    client = dialect(endpoint)
    await client.say([client.image()])
    (message,) = engine.requests[0].messages
    assert message.images == (f"data:image/png;base64,{PIXEL}",)


async def test_a_tool_call_without_an_id_gets_one(setting: Setting, dialect: Any) -> None:
    calls = (ToolCall("", "bash", "{}"), ToolCall("", "bash", "{}"))
    _, endpoint = setting.open(FakeEngine(Message("assistant", "", tool_calls=calls)))
    said = await dialect(endpoint).say([USER])
    ids = [call[0] for call in said.calls]
    assert len(set(ids)) == 2
    assert all(ids)
    assert [call.id for call in setting.calls[0].generation.tool_calls] == ids


async def test_models_are_listed(setting: Setting, dialect: Any) -> None:
    _, endpoint = setting.open(FakeEngine(), model="kat-1")
    listed = await dialect(endpoint).client.models.list()
    assert [model.id for model in listed.data] == ["kat-1"]


async def test_tokens_are_counted(setting: Setting) -> None:
    session, endpoint = setting.open(FakeEngine())
    client = Messages(endpoint).client
    counted = await client.messages.count_tokens(model="policy", messages=[USER], system="be brief")
    assert counted.input_tokens == len("SUA") + len("be brief") + len("hi") + 2
    assert not session.calls


ERRORS = [
    (EngineError("no memory"), "InternalServerError", 503),
    (EngineBusyError("later", 2.5), "RateLimitError", 429),
    (ContextOverflowError("prompt is too long: 9 tokens > 8 maximum"), "BadRequestError", 400),
    (RequestError("this model takes no images"), "BadRequestError", 400),
]


@STREAMED
@pytest.mark.parametrize(
    ("error", "kind", "status"), ERRORS, ids=["engine", "busy", "context", "request"]
)
async def test_what_the_engine_cannot_do_is_an_error_of_the_dialect(
    setting: Setting, dialect: Any, error: Exception, kind: str, status: int, *, stream: bool
) -> None:
    session, endpoint = setting.open(FakeEngine(error))
    client = dialect(endpoint)
    with pytest.raises(getattr(client.errors, kind)) as caught:
        await client.say([USER], stream=stream)
    assert caught.value.status_code == status
    assert str(error) in str(caught.value)
    assert (caught.value.response.headers.get("retry-after") == "3") == (status == 429)
    assert (session.failure is not None) == (status == 503)
    (failure,) = read_failures(setting.log)
    assert (failure.session_id, failure.dialect) == ("s1", dialect.name)
    assert failure.message == str(error)
    assert not setting.calls
    assert (await client.say([USER])).text == "ok"


async def test_keys_models_and_bodies_that_are_not_right(setting: Setting, dialect: Any) -> None:
    session, endpoint = setting.open(FakeEngine())
    client = dialect(endpoint)
    with pytest.raises(
        client.errors.NotFoundError, match="no model 'gpt-9' here; ask for 'policy'"
    ):
        await client.say([USER], model="gpt-9")
    with pytest.raises(client.errors.BadRequestError, match=r"messages?\.(0\.)?role"):
        await client.say([{"role": "robot", "content": "x"}])
    with pytest.raises(client.errors.BadRequestError, match="temperature"):
        await client.say([USER], extra_body={"temperature": -1})
    await setting.proxy.close(session)
    with pytest.raises(client.errors.AuthenticationError, match="names no open rollout"):
        await client.say([USER])
    assert not setting.calls


async def test_a_body_that_is_too_large(
    setting: Setting, dialect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_MAX_BODY", 1 << 20)
    proxy = Proxy(setting.log.with_name("other.jsonl"))
    async with proxy:
        _, endpoint = proxy.open(SessionSpec("s1", FakeEngine(), Sampling()))
        client = dialect(endpoint)
        with pytest.raises(client.errors.APIStatusError, match="larger than 1 MiB") as caught:
            await client.say([{"role": "user", "content": "x" * (1 << 20)}])
        assert caught.value.status_code == 413


async def test_a_spent_budget_stops_the_agent(setting: Setting, dialect: Any) -> None:
    session, endpoint = setting.open(FakeEngine(), budget=Budget(max_calls=1))
    client = dialect(endpoint)
    await client.say([USER])
    with pytest.raises(client.errors.BadRequestError, match="budget of 1 calls; stop now"):
        await client.say([USER])
    assert session.failure is None


async def test_a_stream_that_waits_is_kept_alive_and_told_of_a_late_failure(
    setting: Setting, dialect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_QUIET_S", 0.05)
    engine = FakeEngine("late", EngineError("gone"))
    engine.delay_s = 0.3
    session, endpoint = setting.open(engine)
    client = dialect(endpoint)
    assert (await client.say([USER], stream=True)).text == "late"
    with pytest.raises(client.errors.APIError, match="gone"):
        await client.say([USER], stream=True)
    assert session.failure


async def test_an_engine_that_stalls_is_given_up(setting: Setting, dialect: Any) -> None:
    engine = FakeEngine()
    engine.delay_s = 60
    session, endpoint = setting.open(engine, budget=Budget(call_seconds=0.1))
    client = dialect(endpoint)
    with pytest.raises(client.errors.InternalServerError, match=r"no answer within 0\.1 s"):
        await client.say([USER])
    assert isinstance(session.failure, EngineError)


async def test_the_helper_of_the_responses_client_takes_the_stream(setting: Setting) -> None:
    _, endpoint = setting.open(
        FakeEngine(Message("assistant", "Look:", "hm", tool_calls=(LS, CAT)))
    )
    client = Responses(endpoint)
    async with client.client.responses.stream(model="policy", input=[USER]) as events:
        kinds = [event.type async for event in events]
        answer = await events.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert answer.output_text == "Look:"
    assert [item.type for item in answer.output] == ["reasoning", "message", *["function_call"] * 2]
