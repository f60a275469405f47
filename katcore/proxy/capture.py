"""One call of a session: budget, prompt, answer, record. Whatever goes wrong is a `Problem` for the agent."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from katcore.errors import (
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    InfrastructureError,
    ProxyError,
    RequestError,
)
from katcore.proxy.conversation import Prompt
from katcore.proxy.dialect import Ask, Kind, Problem, Reply
from katcore.proxy.session import BudgetExhausted, Session
from katcore.schema.call import CallFailure, EngineRequest, Generation, ModelCall
from katcore.trajectory.calls import CallLog

_LONG_CHARS = 20_000
"""Prompts with more than this are tokenised in another thread."""


@dataclass(frozen=True, slots=True)
class Source:
    """How a request came: its dialect's name and its body."""

    dialect: str
    body: Mapping[str, Any]


class Capture:
    """Makes calls, and releases none before it is on disk."""

    def __init__(self, log: CallLog) -> None:
        self._log = log

    async def call(self, session: Session, ask: Ask, source: Source) -> Reply:
        """Answer `ask`. Cancelling it cancels the engine's work, but never half a record.

        Raises:
            Problem: there is no answer. A failure of engine or disk is the session's failure, too.
        """
        session.num_asked += 1
        try:
            session.check_budget()
            with session.waiting():
                return await self._call(session, ask, source)
        except BudgetExhausted as spent:
            session.spent_s = session.spent_s or time.monotonic()
            message = f"This rollout has spent its budget of {spent}; stop now."
            raise Problem("budget", message) from spent
        except ContextOverflowError as error:
            raise Problem("context", str(error)) from error
        except RequestError as error:
            raise Problem("invalid", str(error)) from error
        except EngineBusyError as busy:
            raise Problem("busy", str(busy), retry_after_s=busy.retry_after_s) from busy
        except InfrastructureError as error:
            session.failure = session.failure or error
            kind: Kind = "proxy" if isinstance(error, ProxyError) else "engine"
            raise Problem(kind, str(error)) from error

    async def count(self, session: Session, ask: Ask) -> int:
        """How many ids the prompt of `ask` has.

        Raises:
            Problem: the model takes no such prompt.
        """
        try:
            return len((await _prompt(session, ask)).ids)
        except RequestError as error:
            raise Problem("invalid", str(error)) from error

    async def failed(self, session: Session, source: Source, problem: Problem) -> None:
        """Note that a request got no answer."""
        failure = CallFailure(
            problem.kind, session.spec.session_id, source.dialect, problem.message, time.time()
        )
        with contextlib.suppress(ProxyError):
            await self._log.append(failure)

    async def _call(self, session: Session, ask: Ask, source: Source) -> Reply:
        started_s = time.time()
        used = session.sampling(ask.requested)
        prompt = await _prompt(session, ask)
        spec = session.spec
        request = EngineRequest(spec.session_id, prompt.ids, used, ask.messages, ask.tools)
        generation = _named(await _generate(session, request))
        call_id = uuid.uuid4().hex
        call = ModelCall(
            call_id=call_id,
            session_id=spec.session_id,
            parent=prompt.parent,
            num_shared_messages=prompt.num_shared_messages,
            new_messages=prompt.messages[prompt.num_shared_messages :],
            num_shared=prompt.num_shared,
            new_prompt_ids=prompt.ids[prompt.num_shared :],
            generation=generation,
            requested=ask.requested,
            used=used,
            started_s=started_s,
            finished_s=time.time(),
            num_retokenised=prompt.num_retokenised,
            tools=None if prompt.parent else ask.tools,
            dialect=source.dialect,
            raw=session.bodies.delta(call_id, prompt.parent, source.body),
        )
        await asyncio.shield(self._keep(session, call, prompt))
        return Reply(
            call_id,
            ask.model,
            call.finished_s,
            generation,
            len(prompt.ids) or generation.usage[0],
            prompt.num_shared,
            len(generation.ids) or generation.usage[1],
            ask.has_usage,
        )

    async def _keep(self, session: Session, call: ModelCall, prompt: Prompt) -> None:
        await self._log.append(call)
        session.record(call, prompt)


async def _prompt(session: Session, ask: Ask) -> Prompt:
    num_chars = sum(len(message.content) for message in ask.messages)
    if num_chars > _LONG_CHARS:
        return await asyncio.to_thread(session.prompt, ask.messages, ask.tools)
    return session.prompt(ask.messages, ask.tools)


async def _generate(session: Session, request: EngineRequest) -> Generation:
    limit_s = session.spec.budget.call_seconds
    try:
        async with asyncio.timeout(limit_s):
            generation = await session.spec.engine.generate(request)
    except (InfrastructureError, RequestError):
        raise
    except TimeoutError as error:
        raise EngineError(f"the engine gave no answer within {limit_s:g} s") from error
    except Exception as error:
        raise EngineError(f"the engine failed: {error!r}") from error
    if len(generation.ids) != len(generation.logprobs):
        raise EngineError("the engine gave unequal numbers of ids and log-probabilities")
    return generation


def _named(generation: Generation) -> Generation:
    """With an id for every tool call that has none."""
    calls = generation.tool_calls
    if all(call.id for call in calls):
        return generation
    named = (
        call if call.id else replace(call, id=f"call_{uuid.uuid4().hex[:24]}") for call in calls
    )
    return replace(generation, tool_calls=tuple(named))
