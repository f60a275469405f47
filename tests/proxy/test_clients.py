"""The dialects, as the official clients see them: whole and streamed answers, tools, errors."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from katcore.errors import ContextOverflowError, EngineBusyError, EngineError, RequestError
from katcore.proxy import server
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, Session, SessionSpec
from katcore.schema.call import Message, ModelCall, Sampling, ToolCall
from katcore.schema.rollout import ModelEndpoint
from katcore.trajectory.calls import read_calls, read_failures
from tests.proxy.clients import OPEN, PIXEL, SCHEMA, Chat, Gemini, Messages, Responses
from tests.proxy.fakes import FakeEngine

LS = ToolCall("call_a", "bash", '{"command": "ls"}')
CAT = ToolCall("call_b", "bash", '{"command": "cat é"}')


CLIENTS: list[Any] = [Chat, Responses, Messages, Gemini]
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
    while OPEN:
        await OPEN.pop()()


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
    client = dialect(endpoint)
    assert await client.models() == ["kat-1"]
    assert await client.model("kat-1") == "kat-1"
    with pytest.raises(client.errors.NotFoundError, match="ask for 'kat-1'"):
        await client.model("kat-2")


async def test_tokens_are_counted(setting: Setting) -> None:
    session, endpoint = setting.open(FakeEngine())
    client = Messages(endpoint).client
    counted = await client.messages.count_tokens(model="policy", messages=[USER], system="be brief")
    assert counted.input_tokens == len("SUA") + len("be brief") + len("hi") + 2
    gemini = Gemini(endpoint).client
    total = await gemini.aio.models.count_tokens(model="policy", contents="hi")
    assert total.total_tokens == len("UA") + len("hi") + 1
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
    with pytest.raises(client.errors.BadRequestError, match=r"(messages?|contents)\.(0\.)?role"):
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
