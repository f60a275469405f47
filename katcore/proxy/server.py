"""The LLM proxy: agents call it as they would the real service, and every call is recorded.

A call is on disk before its answer is released. It listens on loopback, and behind the doors of sandboxes.
"""

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from katcore.errors import ProxyError
from katcore.proxy import anthropic_messages, chat_completions, gemini, responses
from katcore.proxy.capture import Capture, Source
from katcore.proxy.dialect import STATUS, Dialect, Problem, Reply
from katcore.proxy.door import Door
from katcore.proxy.egress import Egress
from katcore.proxy.session import Session, SessionSpec
from katcore.schema.rollout import ModelEndpoint
from katcore.trajectory.calls import CallLog

_MAX_BODY = 64 << 20
_QUIET_S = 10.0
"""How long a client that streams hears nothing before it is told that the line is alive."""
_DOOR: web.AppKey[Session | None] = web.AppKey("door")

_Served = Callable[[web.Request, Session, Dialect, Source], Awaitable[web.StreamResponse]]
_DIALECTS: dict[str, tuple[str, Dialect]] = {
    "/v1/chat/completions": ("chat-completions", chat_completions),
    "/v1/responses": ("responses", responses),
    "/v1/messages": ("anthropic-messages", anthropic_messages),
}


class Proxy:
    """Serves open sessions; `async with` starts and stops it."""

    def __init__(self, log: Path, *, port: int = 0) -> None:
        self._log = CallLog(log)
        self._capture = Capture(self._log)
        self._port = port
        self._sessions: dict[str, Session] = {}
        self._doors: dict[str, list[web.AppRunner | Door]] = {}
        self._runner = self._serving(None)

    async def __aenter__(self) -> "Proxy":
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=4096)
        try:
            await site.start()
        except OSError as error:
            raise ProxyError(f"port {self._port} of the proxy is taken: {error}") from error
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in list(self._sessions.values()):
            await self.close(session)
        await self._runner.cleanup()
        self._log.close()

    def open(self, spec: SessionSpec) -> tuple[Session, ModelEndpoint]:
        """Open a session; its key is valid until `close`."""
        session = Session(spec)
        self._sessions[session.key] = session
        return session, ModelEndpoint(f"http://127.0.0.1:{self._port}", session.key, spec.model)

    async def listen(
        self, session: Session, door: socket.socket, egress: Egress | None = None
    ) -> None:
        """Serve this session, and no other, on a listening socket of its sandbox; and the way out, if any."""
        runner = self._serving(session)
        await runner.setup()
        doors = self._doors.setdefault(session.key, [])
        if egress:
            doors.append(Door(door, runner, egress))
        else:
            await web.SockSite(runner, door).start()
        doors.append(runner)

    async def close(self, session: Session) -> None:
        """Refuse the session's key from now on, and shut its doors."""
        self._sessions.pop(session.key, None)
        for door in self._doors.pop(session.key, ()):
            await (door.close() if isinstance(door, Door) else door.cleanup())

    def _serving(self, door: Session | None) -> web.AppRunner:
        app = web.Application(client_max_size=_MAX_BODY)
        app[_DOOR] = door
        for path, (name, dialect) in _DIALECTS.items():
            app.router.add_post(path, self._guarded(name, dialect, self._answer))
        count = self._guarded("anthropic-messages", anthropic_messages, self._count)
        app.router.add_post("/v1/messages/count_tokens", count)
        generate = self._guarded("gemini", gemini, self._generate)
        for version in ("v1", "v1beta"):
            app.router.add_get(f"/{version}/models", self._models)
            app.router.add_get(f"/{version}/models/{{model:.+}}", self._models)
            app.router.add_post(f"/{version}/models/{{model:.+}}:{{verb}}", generate)
        return web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,
            shutdown_timeout=1.0,
        )

    def _guarded(
        self, name: str, dialect: Dialect, serve: _Served
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A handler whose problems are answered in the dialect, and noted."""

        async def handle(request: web.Request) -> web.StreamResponse:
            source = Source(name, {})
            session = None
            try:
                session = self._authorised(request)
                source = Source(name, _decoded(await request.read()))
                return await serve(request, session, dialect, source)
            except web.HTTPRequestEntityTooLarge:
                problem = Problem("too-large", f"The body is larger than {_MAX_BODY >> 20} MiB.")
            except Problem as found:
                problem = found
            if session:
                await self._capture.failed(session, source, problem)
            return _refusal(dialect, problem)

        return handle

    def _authorised(self, request: web.Request) -> Session:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        given = (request.headers.get(name, "") for name in ("x-api-key", "x-goog-api-key"))
        session = self._sessions.get(next(filter(None, given), bearer))
        if session is None:
            raise Problem("authentication", "Incorrect API key: it names no open rollout.")
        if request.app[_DOOR] not in (None, session):
            raise Problem("authentication", "Incorrect API key: it is that of another sandbox.")
        return session

    async def _models(self, request: web.Request) -> web.StreamResponse:
        """The model, in a list or by itself, in the dialect of whoever asks."""
        dialect: Any = chat_completions
        if "anthropic-version" in request.headers:
            dialect = anthropic_messages
        elif "x-goog-api-key" in request.headers:
            dialect = gemini
        asked = request.match_info.get("model")
        try:
            model = self._authorised(request).spec.model
            if asked not in (None, model):
                raise _unknown(str(asked), model)
        except Problem as problem:
            return _refusal(dialect, problem)
        return _json(dialect.described(model) if asked else dialect.models(model))

    async def _generate(
        self, request: web.Request, session: Session, dialect: Dialect, source: Source
    ) -> web.StreamResponse:
        """Gemini's calls, whose path says what of other dialects the body says."""
        model, verb = request.match_info["model"], request.match_info["verb"]
        if verb == "countTokens":
            body = {**source.body.get("generateContentRequest", source.body), "model": model}
            return _json({"totalTokens": await self._capture.count(session, dialect.parse(body))})
        if verb not in ("generateContent", "streamGenerateContent"):
            raise Problem("not-found", f"There is no method {verb!r} here.")
        is_streamed = verb == "streamGenerateContent"
        if is_streamed and request.query.get("alt") != "sse":
            raise Problem("invalid", "alt: streams are server-sent events here; ask for alt=sse")
        body = {**source.body, "model": model, "stream": is_streamed}
        return await self._answer(request, session, dialect, Source(source.dialect, body))

    async def _count(
        self, request: web.Request, session: Session, dialect: Dialect, source: Source
    ) -> web.StreamResponse:
        ask = dialect.parse({"max_tokens": 1, **source.body})
        return _json({"input_tokens": await self._capture.count(session, ask)})

    async def _answer(
        self, request: web.Request, session: Session, dialect: Dialect, source: Source
    ) -> web.StreamResponse:
        ask = dialect.parse(source.body)
        if ask.model != session.spec.model:
            raise _unknown(ask.model, session.spec.model)
        calling = self._capture.call(session, ask, source)
        if not ask.is_streamed:
            return _json(dialect.answer(await calling))
        return await _stream(request, dialect, asyncio.ensure_future(calling))


def _unknown(asked: str, model: str) -> Problem:
    return Problem("not-found", f"There is no model {asked!r} here; ask for {model!r}.")


async def _stream(
    request: web.Request, dialect: Dialect, calling: "asyncio.Future[Reply]"
) -> web.StreamResponse:
    """The answer as events. A problem that comes late is an event, too: the status is gone by then."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    try:
        await asyncio.wait({calling}, timeout=_QUIET_S)
        if calling.done():
            reply: Reply | Problem = calling.result()
            await response.prepare(request)
        else:
            await response.prepare(request)
            while not calling.done():
                await response.write(dialect.PING)
                await asyncio.wait({calling}, timeout=_QUIET_S)
            try:
                reply = calling.result()
            except Problem as problem:
                reply = problem
        await response.write(b"".join(dialect.events(reply)))
    finally:
        calling.cancel()
    return response


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Problem("invalid", f"body: not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise Problem("invalid", f"body: a JSON object is needed, not {type(body).__name__}")
    return body


def _refusal(dialect: Dialect, problem: Problem) -> web.Response:
    headers = {}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(problem.retry_after_s))
    return _json(dialect.problem(problem), STATUS[problem.kind], headers)


def _json(body: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )
