"""Somebody else's API, played by our own proxy, which the official clients take for the real one."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from katcore.errors import (
    ConfigError,
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    RequestError,
)
from katcore.inference.upstream import UpstreamEngine
from katcore.plugin import Plugins
from katcore.proxy.server import Proxy
from katcore.proxy.session import SessionSpec
from katcore.schema.call import EngineRequest, Message, Sampling, Tool, ToolCall
from tests.proxy.fakes import FakeEngine

BASH = Tool("bash", "runs a command", '{"type": "object", "properties": {}}')
LS = ToolCall("call_a", "bash", '{"command": "ls"}')
CAT = ToolCall("call_b", "bash", '{"command": "cat"}')


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    async with Proxy(tmp_path / "calls.jsonl") as made:
        yield made


@pytest.fixture(params=["openai", "anthropic"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def upstream(proxy: Proxy, kind: Any, service: FakeEngine) -> UpstreamEngine:
    spec = SessionSpec("s", service, Sampling(max_tokens=500), model="big", is_training=False)
    _, endpoint = proxy.open(spec)
    url = endpoint.base_url + ("/v1" if kind == "openai" else "")
    engine = UpstreamEngine(kind, url, "big", endpoint.api_key)
    engine._client = engine._client.with_options(max_retries=0)
    return engine


def asked(*messages: Message, **sampling: Any) -> EngineRequest:
    given = {"max_tokens": 400} | sampling
    return EngineRequest("r", (), Sampling(**given), messages, (BASH,))


async def test_what_the_service_says_has_no_ids_and_is_marked(proxy: Proxy, kind: Any) -> None:
    engine = upstream(proxy, kind, FakeEngine("hello"))
    made = await engine.generate(asked(Message("system", "be brief"), Message("user", "hi")))
    assert (made.text, made.finish, made.origin, made.policy_version) == (
        "hello",
        "stop",
        "api",
        "big",
    )
    assert made.ids == made.logprobs == engine.encode([Message("user", "hi")]) == ()
    assert made.usage[1] == 6
    await engine.close()


async def test_a_conversation_arrives_as_it_was(proxy: Proxy, kind: Any) -> None:
    service = FakeEngine(Message("assistant", "Look:", tool_calls=(LS, CAT)))
    engine = upstream(proxy, kind, service)
    history = (
        Message("system", "be brief"),
        Message("user", "go", images=("data:image/png;base64,AAAA",)),
        Message("assistant", "", tool_calls=(LS, CAT)),
        Message("tool", "files", tool_call_id="call_a"),
        Message("tool", "text", tool_call_id="call_b"),
        Message("user", "and now?"),
    )
    made = await engine.generate(asked(*history, temperature=0.5, top_p=0.25))
    assert made.text == "Look:"
    assert [(call.id, call.name, json.loads(call.arguments)) for call in made.tool_calls] == [
        ("call_a", "bash", {"command": "ls"}),
        ("call_b", "bash", {"command": "cat"}),
    ]
    (request,) = service.requests
    assert [item.role for item in request.messages] == [item.role for item in history]
    for found, sent in zip(request.messages, history, strict=True):
        assert (found.content, found.images, found.tool_call_id) == (
            sent.content, sent.images, sent.tool_call_id,
        )  # fmt: skip
        assert [call.name for call in found.tool_calls] == [call.name for call in sent.tool_calls]
    (tool,) = request.tools
    assert (tool.name, tool.description, json.loads(tool.parameters)) == (
        "bash", "runs a command", {"type": "object", "properties": {}},
    )  # fmt: skip
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.25)
    await engine.close()


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (EngineBusyError("later", 2), EngineBusyError),
        (ContextOverflowError("prompt is too long: 9 tokens > 8 maximum"), ContextOverflowError),
        (RequestError("this model takes no images"), RequestError),
        (EngineError("no memory"), EngineError),
    ],
)
async def test_a_refusal_says_whose_fault_it_is(
    proxy: Proxy, kind: Any, trouble: Exception, error: type[Exception]
) -> None:
    engine = upstream(proxy, kind, FakeEngine(trouble))
    with pytest.raises(error, match=str(trouble).split(":")[0]) as caught:
        await engine.generate(asked(Message("user", "hi")))
    assert type(caught.value) is error
    if isinstance(caught.value, EngineBusyError):
        assert caught.value.retry_after_s == 2.0
    await engine.close()


async def test_a_key_that_is_refused_is_the_engine_s_failure(proxy: Proxy, kind: Any) -> None:
    engine = upstream(proxy, kind, FakeEngine())
    engine._client = engine._client.with_options(api_key="sk-wrong-and-secret")
    with pytest.raises(EngineError) as caught:
        await engine.generate(asked(Message("user", "hi")))
    assert "secret" not in str(caught.value)
    await engine.close()


def test_the_key_is_named_never_given(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"api": "openai", "model": "big", "key": "SOME_KEY", "base_url": "http://127.0.0.1:1"}
    with pytest.raises(ConfigError, match="set the environment variable SOME_KEY"):
        Plugins.installed().make("engine", "upstream", options)
    monkeypatch.setenv("SOME_KEY", "k1")
    assert Plugins.installed().make("engine", "upstream", options)._client.api_key == "k1"
    for value in ('{"conn_type": "http", "password": "k 2"}', "http://:k%202@host"):
        monkeypatch.setenv("AIRFLOW_CONN_MODELS", value)
        engine = Plugins.installed().make("engine", "upstream", options | {"key": "airflow:models"})
        assert engine._client.api_key == "k 2"
