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
from katcore.proxy import anthropic_messages, chat_completions, responses
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
_PING = b": ping\n\n"
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
        app.router.add_get("/v1/models", self._models)
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
        session = self._sessions.get(request.headers.get("x-api-key", "") or bearer)
        if session is None:
            raise Problem("authentication", "Incorrect API key: it names no open rollout.")
        if request.app[_DOOR] not in (None, session):
            raise Problem("authentication", "Incorrect API key: it is that of another sandbox.")
        return session

    async def _models(self, request: web.Request) -> web.StreamResponse:
        is_anthropic = "anthropic-version" in request.headers
        dialect: Dialect = anthropic_messages if is_anthropic else chat_completions
        try:
            model = self._authorised(request).spec.model
        except Problem as problem:
            return _refusal(dialect, problem)
        listed = anthropic_messages.models if is_anthropic else chat_completions.models
        return _json(listed(model))

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
            message = f"There is no model {ask.model!r} here; ask for {session.spec.model!r}."
            raise Problem("not-found", message)
        calling = self._capture.call(session, ask, source)
        if not ask.is_streamed:
            return _json(dialect.answer(await calling))
        return await _stream(request, dialect, asyncio.ensure_future(calling))


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
                await response.write(_PING)
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
