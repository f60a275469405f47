"""The wire: OpenAI's Chat Completions as its clients know it, and the log that comes first."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from katcore.errors import EngineError, ProxyError
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, Session, SessionSpec
from katcore.schema.call import CallFailure, ModelCall, Sampling
from katcore.schema.rollout import ModelEndpoint
from katcore.trajectory.calls import CallLog, read_calls
from tests.proxy.fakes import FakeEngine, text_of

USER = {"role": "user", "content": "hi"}


class Client:
    """What an agent would use: HTTP alone."""

    def __init__(self, endpoint: ModelEndpoint, http: aiohttp.ClientSession) -> None:
        self.endpoint = endpoint
        self.http = http

    async def post(self, body: object, key: str = "") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key or self.endpoint.api_key}"}
        url = f"{self.endpoint.base_url}/v1/chat/completions"
        if isinstance(body, dict):
            body = {"model": "policy"} | body
        data = body if isinstance(body, str) else json.dumps(body)
        async with self.http.post(url, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def say(self, *messages: dict[str, Any], **more: Any) -> str:
        status, body = await self.post({"model": "policy", "messages": messages, **more})
        assert status == 200, body
        return str(body["choices"][0]["message"]["content"])


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    async with Proxy(tmp_path / "calls.jsonl") as made:
        yield made


def opened(
    proxy: Proxy, http: aiohttp.ClientSession, engine: FakeEngine, **settings: Any
) -> tuple[Session, Client]:
    spec = SessionSpec("s1", engine, settings.pop("sampling", Sampling()), Budget(**settings))
    session, endpoint = proxy.open(spec)
    return session, Client(endpoint, http)


def calls(tmp_path: Path) -> list[ModelCall]:
    return list(read_calls(tmp_path / "calls.jsonl"))


async def test_an_answer_is_a_chat_completion(proxy: Proxy, http: Any) -> None:
    _, client = opened(proxy, http, FakeEngine("hello"))
    status, body = await client.post({"messages": [USER]})
    assert status == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "policy",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 6,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_cut_answer_says_length(proxy: Proxy, http: Any) -> None:
    _, client = opened(proxy, http, FakeEngine("hel", finish="length"))
    _, body = await client.post({"messages": [USER]})
    assert body["choices"][0]["finish_reason"] == "length"


async def test_models_are_listed(proxy: Proxy, http: aiohttp.ClientSession) -> None:
    _, client = opened(proxy, http, FakeEngine())
    headers = {"Authorization": f"Bearer {client.endpoint.api_key}"}
    async with http.get(f"{client.endpoint.base_url}/v1/models", headers=headers) as response:
        body = await response.json()
    assert [model["id"] for model in body["data"]] == [client.endpoint.model]
    async with http.get(f"{client.endpoint.base_url}/v1/models") as response:
        assert response.status == 401


async def test_a_streamed_answer_is_server_sent_events(proxy: Proxy, http: Any) -> None:
    _, client = opened(proxy, http, FakeEngine("a\nb"))
    url = f"{client.endpoint.base_url}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {client.endpoint.api_key}"}
    body = {"model": "policy", "messages": [USER], "stream": True}
    async with http.post(url, json=body, headers=headers) as response:
        assert response.content_type == "text/event-stream"
        lines = (await response.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "a\nb"
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes == [None, None, "stop"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("{", "body: not valid JSON"),
        ("[]", "body: a JSON object is needed, not list"),
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [USER], "tools": [{"type": "web"}]}, "tools.0.type"),
        ({"messages": [USER], "n": 2}, "n: "),
        ({"messages": [USER], "temperature": "hot"}, "temperature: "),
        ({"messages": [USER], "max_tokens": -1}, "max_tokens: "),
        ({"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
            "messages.0.content",
        ),
    ],
)
async def test_a_bad_request_names_its_field(
    proxy: Proxy, http: Any, tmp_path: Path, body: object, field: str
) -> None:
    session, client = opened(proxy, http, FakeEngine())
    status, answer = await client.post(body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert field in answer["error"]["message"]
    assert session.failure is None
    assert not calls(tmp_path)


async def test_what_clients_send_besides_is_taken(proxy: Proxy, http: Any) -> None:
    engine = FakeEngine()
    _, client = opened(proxy, http, engine)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    nulls = dict.fromkeys(("temperature", "stream", "n", "max_tokens", "seed", "stop"))
    assert await client.say(*messages, **nulls, tools=[], metadata={"x": "y"}) == "ok"
    assert text_of(engine.requests[0].prompt_ids) == "S:be brief|U:ab|A:"


async def test_an_unknown_key_is_401(proxy: Proxy, http: Any, tmp_path: Path) -> None:
    session, client = opened(proxy, http, FakeEngine())
    for key in ("nonsense", session.key + "x", session.spec.session_id):
        status, body = await client.post({"messages": [USER]}, key)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    await proxy.close(session)
    assert (await client.post({"messages": [USER]}))[0] == 401
    assert not calls(tmp_path)


@pytest.mark.parametrize(
    ("budget", "spent"),
    [
        ({"max_calls": 2}, "2 calls"),
        ({"max_tokens": 6}, "6 sampled tokens"),
        ({"seconds": 0.3}, "0.3 s"),
    ],
)
async def test_a_spent_budget_is_400(
    proxy: Proxy, http: Any, budget: dict[str, Any], spent: str
) -> None:
    session, client = opened(proxy, http, FakeEngine(), **budget)
    for _ in range(2):
        await client.say(USER)
    await asyncio.sleep(0.3 if "seconds" in budget else 0)
    status, body = await client.post({"messages": [USER]})
    assert (status, body["error"]["code"]) == (400, "budget_exhausted")
    assert spent in body["error"]["message"]
    assert len(session.calls) == 2
    assert session.failure is None


async def test_calls_made_at_once_do_not_overdraw(proxy: Proxy, http: Any) -> None:
    session, client = opened(proxy, http, FakeEngine(), max_calls=3)
    answers = await asyncio.gather(*(client.post({"messages": [USER]}) for _ in range(9)))
    assert sorted(status for status, _ in answers) == [200] * 3 + [400] * 6
    assert len(session.calls) == 3


@pytest.mark.parametrize("failure", [EngineError("no memory"), RuntimeError("a bug"), OSError(5)])
async def test_an_engine_that_fails_is_503_and_marks_the_session(
    proxy: Proxy, http: Any, tmp_path: Path, failure: Exception
) -> None:
    session, client = opened(proxy, http, FakeEngine(failure))
    status, body = await client.post({"messages": [USER]})
    assert (status, body["error"]["code"]) == (503, "engine_failed")
    assert isinstance(session.failure, EngineError)
    assert not calls(tmp_path)
    assert await client.say(USER) == "ok"
    assert session.failure, "what failed once stays marked"


async def test_an_engine_without_logprobs_is_refused(proxy: Proxy, http: Any) -> None:
    class Careless(FakeEngine):
        async def generate(self, request: Any) -> Any:
            import dataclasses

            return dataclasses.replace(await super().generate(request), logprobs=(0.0,))

    session, client = opened(proxy, http, Careless("hello"))
    assert (await client.post({"messages": [USER]}))[0] == 503
    assert isinstance(session.failure, EngineError)


class HeldLog(CallLog):
    """A log whose disk takes its time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def append(self, call: ModelCall | CallFailure) -> None:
        self.asked.set()
        await self.go.wait()
        await super().append(call)


@pytest.mark.parametrize("stream", [False, True])
async def test_not_a_byte_is_released_before_the_line_is_on_disk(
    proxy: Proxy,
    http: Any,
    tmp_path: Path,
    stream: bool,  # noqa: FBT001
) -> None:
    log = HeldLog(tmp_path / "calls.jsonl")
    proxy._capture._log = log
    session, client = opened(proxy, http, FakeEngine("hello"))
    host, port = client.endpoint.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": "policy", "messages": [USER], "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: Bearer {session.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await log.asked.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.3)
    assert not session.calls
    assert not calls(tmp_path)
    log.go.set()
    answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"hello" in answer
    assert [call.generation.text for call in calls(tmp_path)] == ["hello"]


async def test_with_a_full_disk_no_answer_is_released(http: Any, tmp_path: Path) -> None:
    (tmp_path / "calls.jsonl").symlink_to("/dev/full")
    async with Proxy(tmp_path / "calls.jsonl") as proxy:
        session, client = opened(proxy, http, FakeEngine("hello"))
        status, body = await client.post({"messages": [USER]})
    assert status == 500
    assert "hello" not in json.dumps(body)
    assert isinstance(session.failure, ProxyError)
    assert not session.calls


async def test_requested_and_used_sampling_are_both_recorded(
    proxy: Proxy, http: Any, tmp_path: Path
) -> None:
    engine = FakeEngine()
    _, client = opened(proxy, http, engine, sampling=Sampling(0.7, 20, 100))
    await client.say(USER, temperature=0.1, max_tokens=5, seed=3)
    await client.say(USER, max_completion_tokens=50)
    first, second = calls(tmp_path)
    assert first.requested == Sampling(0.1, 5, 3)
    assert first.used == engine.requests[0].sampling == Sampling(0.7, 5, 100)
    assert second.requested == Sampling(1.0, 50, None)
    assert second.used == engine.requests[1].sampling == Sampling(0.7, 20, 101)


async def test_a_conversation_continues_the_recorded_ids(
    proxy: Proxy, http: Any, tmp_path: Path
) -> None:
    engine = FakeEngine("one", "two", "three")
    _, client = opened(proxy, http, engine)
    messages = [USER]
    for _ in range(3):
        answer = await client.say(*messages)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "on"}]
    first, second, third = calls(tmp_path)
    assert text_of(engine.requests[2].prompt_ids) == "U:hi|A:one|U:on|A:two|U:on|A:"
    assert (first.parent, second.parent, third.parent) == ("", first.call_id, second.call_id)
    shared = engine.requests[1].prompt_ids + second.generation.ids
    assert third.num_shared == len(shared)
    assert engine.requests[2].prompt_ids == shared + third.new_prompt_ids
    assert text_of(third.new_prompt_ids) == "U:on|A:"
    assert all(call.is_exact for call in (first, second, third))


async def test_sessions_do_not_share_history(proxy: Proxy, http: Any, tmp_path: Path) -> None:
    for _ in range(2):
        _, client = opened(proxy, http, FakeEngine("one", "two"))
        await client.say(USER)
    assert [call.parent for call in calls(tmp_path)] == ["", ""]
    assert len({call.call_id for call in calls(tmp_path)}) == 2


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.integers(0, 3), min_size=1, max_size=24))
async def test_sessions_at_once_are_as_if_each_were_alone(tmp_path: Path, order: list[int]) -> None:
    """All say the same things, so that whatever leaked from one to another would fit there."""
    async with Proxy(tmp_path / "calls.jsonl") as proxy, aiohttp.ClientSession() as http:
        engines = [FakeEngine("one", "one", "two") for _ in range(4)]
        clients = [opened(proxy, http, engine)[1] for engine in engines]
        histories: list[list[dict[str, Any]]] = [[USER] for _ in range(4)]

        async def turn(which: int) -> None:
            answer = await clients[which].say(*histories[which])
            histories[which] += [{"role": "assistant", "content": answer}, USER]

        for start in range(0, len(order), 3):
            await asyncio.gather(*(turn(which) for which in set(order[start : start + 3])))
    for engine in engines:
        alone = FakeEngine("one", "one", "two")
        prompts = [text_of(request.prompt_ids) for request in engine.requests]
        said = [alone.answers[n] if n < 3 else "ok" for n in range(len(prompts))]
        expected = ["".join(f"U:hi|A:{text}|" for text in said[:n]) for n in range(len(prompts))]
        assert prompts == [f"{before}U:hi|A:" for before in expected]


def knock(port: int, key: str) -> aiohttp.ClientSession:
    """A client inside the sandbox whose door has this port."""
    headers = {"Authorization": f"Bearer {key}"}
    return aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers)


async def test_a_door_serves_its_own_session_alone(proxy: Proxy, http: Any) -> None:
    body = {"model": "policy", "messages": [USER]}
    (first, _), (second, _) = opened(proxy, http, FakeEngine()), opened(proxy, http, FakeEngine())
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        await proxy.listen(first, door)
        for key, status in ((first.key, 200), (second.key, 401)):
            inside = knock(port, key)
            async with inside, inside.post("/v1/chat/completions", json=body) as response:
                assert response.status == status
                assert ("another sandbox" in await response.text()) == (status == 401)
        await proxy.close(first)
        async with knock(port, first.key) as inside:
            with pytest.raises(aiohttp.ClientError):
                await inside.post("/v1/chat/completions", json=body)
    assert (len(first.calls), len(second.calls)) == (1, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_engine(
    proxy: Proxy,
    http: Any,
    stream: bool,  # noqa: FBT001
) -> None:
    class Slow(FakeEngine):
        cancelled = False

        async def generate(self, request: Any) -> Any:
            try:
                return await super().generate(request)
            except asyncio.CancelledError:
                Slow.cancelled = True
                raise

    engine = Slow()
    engine.go.clear()
    session, client = opened(proxy, http, engine)
    asking = asyncio.create_task(client.post({"messages": [USER], "stream": stream}))
    await asyncio.wait_for(engine.asked.wait(), 10)
    asking.cancel()
    for _ in range(100):
        await asyncio.sleep(0.02)
        if Slow.cancelled:
            break
    assert Slow.cancelled
    assert (session.calls, session.num_open, session.failure) == ([], 0, None)
    engine.go.set()
    assert await client.say(USER) == "ok"


async def test_in_evaluation_the_agent_samples_as_it_likes(proxy: Proxy, http: Any) -> None:
    engine = FakeEngine()
    spec = SessionSpec("s1", engine, Sampling(0.7, 20), is_training=False)
    _, endpoint = proxy.open(spec)
    await Client(endpoint, http).say(USER, temperature=0.1, max_tokens=50, top_p=0.5)
    assert engine.requests[0].sampling == Sampling(0.1, 20, top_p=0.5)


async def test_a_taken_port_is_said(proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(ProxyError, match=f"port {proxy._port} of the proxy is taken"):
        async with Proxy(tmp_path / "other.jsonl", port=proxy._port):
            pass


async def test_it_listens_on_loopback_alone(proxy: Proxy) -> None:
    assert [address[0] for address in proxy._runner.addresses] == ["127.0.0.1"]
