"""Several engines of one policy as one: conversations stay where their prefix is, and nobody is swamped.

A session's first call goes to a replica by rendezvous hashing of its prompt, so that rollouts of one task
begin where their common prompt is cached; later calls go where the last one went. No replica gets more than
`_SLACK` times its share of the open calls (consistent hashing with bounded loads, arXiv 1608.01350): what is
too much goes to the next in the hash's order. A replica that fails gets no calls until it has opened again
with the newest weights; what it was asked is asked of another. While engines sleep none is opened again, for
the trainer has their GPUs.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import ceil
from typing import Any, Protocol, TypeVar

from katcore.errors import EngineBusyError, EngineError
from katcore.protocols import (
    Engine,
    SupportsClose,
    SupportsOpen,
    SupportsScore,
    SupportsSleep,
    SupportsTokens,
)
from katcore.schema.call import EngineRequest, Generation, Message, ScoreRequest, Tool

_SLACK = 1.25
_MAX_SESSIONS = 1 << 16
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0

_LOG = logging.getLogger(__name__)
AnswerT = TypeVar("AnswerT")


class Replica(Engine, SupportsTokens, SupportsScore, Protocol):
    """What a router takes."""


Change = Callable[[Any], Awaitable[None]]
"""How one replica gets new weights."""


@dataclass(slots=True)
class _Place:
    """A replica, its open calls, and since when it has had some; `error` is why it gets none.

    Who gives it weights, or sends it to sleep, is `changing` it.
    """

    engine: Replica
    number: int
    num_open: int = 0
    busy_s: float = 0.0
    busy_since_s: float = 0.0
    error: EngineError | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Router:
    """An engine over `replicas`, which all have the same model."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._places = [_Place(engine, number) for number, engine in enumerate(replicas)]
        self._sessions: OrderedDict[str, int] = OrderedDict()
        self._change: Change | None = None
        self._recoveries: set[asyncio.Task[None]] = set()
        self._is_awake = asyncio.Event()
        self._is_awake.set()
        self._measured_s = time.monotonic()

    async def open(self, report: Callable[[str], None]) -> None:
        """See `SupportsOpen.open`; all at once."""
        engines = [place.engine for place in self._places]
        openers = [engine for engine in engines if isinstance(engine, SupportsOpen)]
        await asyncio.gather(*(engine.open(report) for engine in openers))

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """See `Engine.encode`."""
        return self._places[0].engine.encode(messages, tools=tools, start=start)

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """See `SupportsTokens.token_texts`."""
        return self._places[0].engine.token_texts(ids)

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`."""
        own = self._sessions.get(request.session_id)
        order = self._order(request.prompt_ids, own)
        answer, place = await self._ask(order, lambda engine: engine.generate(request))
        self._sessions[request.session_id] = place.number
        self._sessions.move_to_end(request.session_id)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return answer

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        """See `SupportsScore.score`; no cache is read, so any replica will do."""
        order = sorted(self._places, key=lambda place: place.num_open)
        answer, _ = await self._ask(order, lambda engine: engine.score(request))
        return answer

    async def renew(self, change: Change) -> None:
        """Have `change` give each replica new weights, all at once.

        One that does not take them gets no calls until it has taken them, which is tried again and again.

        Raises:
            EngineError: none has taken them.
        """
        self._change = change
        self._is_awake.set()
        places = [place for place in self._places if place.error is None] or self._places
        errors = await asyncio.gather(*(self._renewed(place, change) for place in places))
        if None not in errors:
            raise EngineError(f"no replica takes new weights: {errors[0]}") from errors[0]

    async def sleep(self) -> None:
        """See `SupportsSleep.sleep`; those that cannot stay as they are. None wakes before `renew`."""
        self._is_awake.clear()
        await asyncio.gather(*(self._put_to_sleep(place) for place in self._places))

    def idle_share(self) -> float:
        """The share of the time since this was last asked in which a replica had no call: their mean."""
        now = time.monotonic()
        whole_s, busy_s = now - self._measured_s, 0.0
        for place in self._places:
            if place.num_open:
                place.busy_s += now - place.busy_since_s
                place.busy_since_s = now
            busy_s += place.busy_s
            place.busy_s = 0.0
        self._measured_s = now
        return max(0.0, 1.0 - busy_s / len(self._places) / whole_s) if whole_s else 0.0

    async def close(self) -> None:
        """See `SupportsClose.close`."""
        for task in self._recoveries:
            task.cancel()
        await asyncio.gather(*self._recoveries, return_exceptions=True)
        for place in self._places:
            if isinstance(place.engine, SupportsClose):
                await place.engine.close()

    def _order(self, prompt_ids: Sequence[int], own: int | None) -> list[_Place]:
        """The session's own replica, then all by the hash of the prompt."""
        if len(self._places) == 1:
            return self._places
        prompt = ",".join(map(str, prompt_ids)).encode()
        hashes = [blake2b(prompt, salt=b"%d" % place.number).digest() for place in self._places]
        return sorted(self._places, key=lambda place: (place.number != own, hashes[place.number]))

    def _choose(self, order: Sequence[_Place]) -> _Place:
        """The first in `order` that is well and has room; if none is well, the first."""
        well = [place for place in order if place.error is None]
        if not well:
            return order[0]
        most = ceil(_SLACK * (1 + sum(place.num_open for place in well)) / len(well))
        return next(place for place in well if place.num_open < most)

    async def _ask(
        self, order: Sequence[_Place], call: Callable[[Replica], Awaitable[AnswerT]]
    ) -> tuple[AnswerT, _Place]:
        """The answer of the first that gives one, and who that was."""
        left = list(order)
        while True:
            place = self._choose(left)
            left.remove(place)
            try:
                return await self._counted(place, call), place
            except EngineError as error:
                if not isinstance(error, EngineBusyError):
                    self._fails(place, error)
                if not left:
                    raise

    async def _counted(
        self, place: _Place, call: Callable[[Replica], Awaitable[AnswerT]]
    ) -> AnswerT:
        if not place.num_open:
            place.busy_since_s = time.monotonic()
        place.num_open += 1
        try:
            return await call(place.engine)
        finally:
            place.num_open -= 1
            if not place.num_open:
                place.busy_s += time.monotonic() - place.busy_since_s

    def _fails(self, place: _Place, error: EngineError) -> None:
        if place.error is None and len(self._places) > 1:
            _LOG.warning("replica %d gets no calls until it is back: %s", place.number, error)
            place.error = error
            task = asyncio.create_task(self._recover(place))
            self._recoveries.add(task)
            task.add_done_callback(self._recoveries.discard)

    async def _put_to_sleep(self, place: _Place) -> None:
        async with place.changing:
            if not isinstance(place.engine, SupportsSleep):
                return
            try:
                await place.engine.sleep()
            except EngineError as error:
                if place.error is None:
                    raise
                _LOG.warning("replica %d, which is away, does not sleep: %s", place.number, error)

    async def _recover(self, place: _Place) -> None:
        rest_s = _FIRST_REST_S
        while place.error is not None:
            await asyncio.sleep(rest_s)
            rest_s = min(2 * rest_s, _LONGEST_REST_S)
            await self._is_awake.wait()
            async with place.changing:
                await self._try(place)

    async def _try(self, place: _Place) -> None:
        """Have a replica that failed take the newest weights, or open again; then it is back."""
        if place.error is None or not self._is_awake.is_set():
            return
        change = self._change
        try:
            if change is not None:
                await change(place.engine)
            elif isinstance(place.engine, SupportsOpen):
                await place.engine.open(_LOG.info)
        except EngineError as error:
            place.error = error
            return
        if change is self._change:
            place.error = None

    async def _renewed(self, place: _Place, change: Change) -> EngineError | None:
        async with place.changing:
            try:
                await change(place.engine)
            except EngineError as error:
                self._fails(place, error)
                return error
            place.error = None
            return None
