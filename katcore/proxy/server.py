"""The LLM proxy: agents call it as they would the real service, and every call is recorded.

A call is on disk before its answer is released. It listens on loopback alone.
"""

import time
import uuid
from pathlib import Path

from aiohttp import web

from katcore.errors import EngineError, InfrastructureError, ProxyError
from katcore.protocols import Engine
from katcore.proxy import chat_completions
from katcore.proxy.session import BudgetExhausted, Session, SessionSpec
from katcore.schema.call import EngineRequest, Generation, Message, ModelCall, Sampling
from katcore.schema.rollout import ModelEndpoint
from katcore.trajectory.calls import CallLog

MODEL = "policy"
_MAX_BODY = 64 << 20


class Proxy:
    """Serves open sessions; `async with` starts and stops it."""

    def __init__(self, log: Path, *, port: int = 0) -> None:
        self._log = CallLog(log)
        self._port = port
        self._sessions: dict[str, Session] = {}
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)

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
        await self._runner.cleanup()
        self._log.close()

    def open(self, spec: SessionSpec) -> tuple[Session, ModelEndpoint]:
        """Open a session; its key is valid until `close`."""
        session = Session(spec)
        self._sessions[session.key] = session
        return session, ModelEndpoint(f"http://127.0.0.1:{self._port}/v1", session.key, MODEL)

    def close(self, session: Session) -> None:
        """Refuse the session's key from now on."""
        self._sessions.pop(session.key, None)

    def _authorised(self, request: web.Request) -> Session:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        session = self._sessions.get(key)
        if session is None:
            body = chat_completions.error(
                "Incorrect API key: it names no open rollout.",
                "invalid_request_error",
                "invalid_api_key",
            )
            raise web.HTTPUnauthorized(text=_json(body), content_type="application/json")
        return session

    async def _models(self, request: web.Request) -> web.Response:
        self._authorised(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "katcore"}
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session = self._authorised(request)
        try:
            messages, requested, is_stream = chat_completions.parse(await request.read())
            call, num_prompt = await self._call(session, messages, requested)
        except chat_completions.BadRequest as error:
            return _error(400, str(error), "invalid_request_error")
        except BudgetExhausted as spent:
            message = f"This rollout has spent its budget of {spent}; stop now."
            return _error(403, message, "budget_exhausted", "budget_exhausted")
        except InfrastructureError as error:
            session.failure = session.failure or error
            return _error(503, str(error), "server_error", "engine_failed")
        if not is_stream:
            return web.json_response(chat_completions.answer(call, MODEL, num_prompt))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in chat_completions.events(call, MODEL):
            await response.write(event)
        return response

    async def _call(
        self, session: Session, messages: tuple[Message, ...], requested: Sampling
    ) -> tuple[ModelCall, int]:
        session.check_budget()
        used = session.sampling(requested)
        started_s = time.time()
        with session.waiting():
            prompt = session.prompt(messages)
            ids = prompt.shared_ids + prompt.new_ids
            request = EngineRequest(session.spec.session_id, ids, used, messages)
            generation = await _generate(session.spec.engine, request)
            call = ModelCall(
                uuid.uuid4().hex,
                session.spec.session_id,
                prompt.parent,
                len(prompt.shared_ids),
                prompt.new_ids,
                prompt.new_messages,
                generation,
                requested,
                used,
                started_s,
                time.time(),
                prompt.is_exact,
            )
            await self._log.append(call)
            session.record(call, prompt, messages)
        return call, len(ids)


async def _generate(engine: Engine, request: EngineRequest) -> Generation:
    try:
        generation = await engine.generate(request)
    except InfrastructureError:
        raise
    except Exception as error:
        raise EngineError(f"the engine failed: {error!r}") from error
    if len(generation.ids) != len(generation.logprobs):
        raise EngineError("the engine gave unequal numbers of ids and log-probabilities")
    return generation


def _json(body: object) -> str:
    return web.json_response(body).text or ""


def _error(status: int, message: str, kind: str, code: str | None = None) -> web.Response:
    return web.json_response(chat_completions.error(message, kind, code), status=status)
