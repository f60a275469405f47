"""The mini scaffold: one answer, one command; and what the model is shown of it."""

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from katcore.errors import SandboxTimeoutError, ScaffoldError
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, SessionSpec
from katcore.scaffold.mini import MiniConfig, MiniScaffold, render
from katcore.schema.call import Sampling
from katcore.schema.rollout import ExecResult, ModelEndpoint
from tests.proxy.fakes import FakeEngine, text_of
from tests.rollout.fakes import FakeSandbox

_DEFAULT = Budget()


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    async with Proxy(tmp_path / "calls.jsonl") as made:
        yield made


async def run(
    proxy: Proxy,
    engine: FakeEngine,
    sandbox: FakeSandbox,
    budget: Budget = _DEFAULT,
    **options: Any,
) -> str:
    _, endpoint = proxy.open(SessionSpec("s", engine, Sampling(), budget))
    result = await MiniScaffold(MiniConfig(**options)).run("do it", sandbox, endpoint)
    assert result.exit_code == 0
    return result.stderr.decode()


async def test_a_conversation_until_submit(proxy: Proxy) -> None:
    engine = FakeEngine("put a 1", "get a", "get b", "submit")
    sandbox = FakeSandbox()
    assert await run(proxy, engine, sandbox) == "submitted"
    assert sandbox.commands == [["bash", "-c", item] for item in ("put a 1", "get a", "get b")]
    assert text_of(engine.requests[-1].prompt_ids) == (
        "U:do it|A:put a 1|U:ok|A:get a|U:1|A:get b|U:[exit 1]\nno get b|A:"
    )


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        ("  ls  ", "ls"),
        ("```bash\nls -l\n```", "ls -l"),
        ("I will look.\n```sh\nls\npwd\n```\nDone.", "ls\npwd"),
        ("```\nls\n```", "ls"),
        ("echo submit", "echo submit"),
        ("", ""),
    ],
)
async def test_what_is_taken_for_the_command(proxy: Proxy, answer: str, command: str) -> None:
    sandbox = FakeSandbox()
    await run(proxy, FakeEngine(answer, "submit"), sandbox)
    assert sandbox.commands == [["bash", "-c", command]]


@pytest.mark.parametrize("answer", ["submit", " submit\n", "```bash\nsubmit\n```"])
async def test_what_is_taken_for_submit(proxy: Proxy, answer: str) -> None:
    sandbox = FakeSandbox()
    assert await run(proxy, FakeEngine(answer), sandbox) == "submitted"
    assert not sandbox.commands


async def test_limits_end_it_and_say_so(proxy: Proxy) -> None:
    assert await run(proxy, FakeEngine(), FakeSandbox(), max_turns=2) == "turns"
    assert await run(proxy, FakeEngine(), FakeSandbox(), Budget(max_calls=1)) == "budget"
    sandbox = FakeSandbox()
    assert await run(proxy, FakeEngine("put a", finish="length"), sandbox) == "length"
    assert not sandbox.commands, "half a command is not run"


async def test_one_that_repeats_itself_is_stuck(proxy: Proxy) -> None:
    engine = FakeEngine("get a", "get b", "get a", "get a", "get a", "submit")
    assert await run(proxy, engine, FakeSandbox(), max_turns=9) == "stuck"
    assert len(engine.requests) == 5


async def test_the_same_command_with_another_output_is_no_repetition(proxy: Proxy) -> None:
    class Counter(FakeSandbox):
        async def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
            await super().exec(argv, **options)
            return ExecResult(0, str(len(self.commands)).encode(), b"")

    engine = FakeEngine("get a", "get a", "get a", "submit")
    assert await run(proxy, engine, Counter(), max_repeats=2) == "submitted"


async def test_a_command_that_takes_too_long_is_shown_as_that(proxy: Proxy) -> None:
    engine = FakeEngine("ls", "submit")
    sandbox = FakeSandbox({"exec": SandboxTimeoutError("x")})
    await run(proxy, engine, sandbox, command_timeout_s=2.5)
    assert "[timeout 2.5 s]" in text_of(engine.requests[-1].prompt_ids)


async def test_what_is_no_command_is_shown_as_that(proxy: Proxy) -> None:
    engine = FakeEngine("a\0b", "submit")
    assert await run(proxy, engine, FakeSandbox({"exec": ValueError("null byte")})) == "submitted"
    assert "[not a command: null byte]" in text_of(engine.requests[-1].prompt_ids)


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (ExecResult(0, b"", b""), "ok"),
        (ExecResult(0, b"  a\n\n", b""), "a"),
        (ExecResult(0, b"out\n", b"err\n"), "out\nerr"),
        (ExecResult(3, b"", b"err\n"), "[exit 3]\nerr"),
        (ExecResult(1, b"", b""), "[exit 1]"),
        (ExecResult(0, b"\xff", b""), "\ufffd"),
        (ExecResult(0, b"a" * 10 + b"b" * 10, b""), "a" * 10 + "b" * 10),
        (ExecResult(0, b"a" * 11 + b"b" * 11, b""), "a" * 10 + "\n[...]\n" + "b" * 10),
    ],
)
def test_what_the_model_is_shown(result: ExecResult, shown: str) -> None:
    assert render(result, 20) == shown


async def serve(status: int, body: str, kind: str) -> tuple[web.AppRunner, ModelEndpoint]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body, content_type=kind)

    app = web.Application()
    app.router.add_post("/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, ModelEndpoint(f"http://127.0.0.1:{runner.addresses[0][1]}", "k", "m")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, "<html>", "text/html"),
        (200, "not json", "application/json"),
        (200, json.dumps({"choices": []}), "application/json"),
        (200, "{}", "application/json"),
        (200, "[]", "application/json"),
        (500, json.dumps({"error": "flat"}), "application/json"),
        (503, json.dumps({"error": {"message": "gone"}}), "application/json"),
        (401, json.dumps({"error": {"message": "who?"}}), "application/json"),
    ],
)
async def test_an_endpoint_that_is_none_is_the_scaffold_s_error(
    status: int, body: str, kind: str
) -> None:
    runner, endpoint = await serve(status, body, kind)
    with pytest.raises(ScaffoldError):
        await MiniScaffold(MiniConfig()).run("x", FakeSandbox(), endpoint)
    await runner.cleanup()


async def test_no_endpoint_at_all_is_the_scaffold_s_error() -> None:
    endpoint = ModelEndpoint("http://127.0.0.1:1/v1", "k", "m")
    with pytest.raises(ScaffoldError, match="no chat completion from the endpoint"):
        await MiniScaffold(MiniConfig()).run("x", FakeSandbox(), endpoint)
