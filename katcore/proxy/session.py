"""Sessions: one API key, one rollout, one budget."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from katcore.errors import InfrastructureError
from katcore.protocols import Engine
from katcore.schema.call import Message, ModelCall, Sampling


@dataclass(frozen=True, slots=True)
class Budget:
    """What one rollout may spend. Agents ignore their own limits, so these are held here."""

    max_calls: int = 64
    max_tokens: int = 65536
    seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a session is opened with.

    `sampling` is the run's: temperature and seed override whatever the agent asks for, and `max_tokens`
    bounds it.
    """

    session_id: str
    engine: Engine
    sampling: Sampling
    budget: Budget = Budget()


class BudgetExhausted(Exception):  # noqa: N818 - an expected end, not a failure
    """The session has spent its budget; the agent is told to stop."""


@dataclass(slots=True)
class _Path:
    """The conversation up to and including one recorded call."""

    call_id: str
    messages: tuple[Message, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in token ids, and how it continues what was recorded."""

    parent: str
    shared_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    new_messages: tuple[Message, ...]
    is_exact: bool


@dataclass(slots=True)
class Session:
    """One open rollout: its calls so far, as the paths that a next call can continue."""

    spec: SessionSpec
    key: str = field(default_factory=lambda: f"kat-{secrets.token_urlsafe(24)}")
    calls: list[ModelCall] = field(default_factory=list)
    failure: InfrastructureError | None = None
    num_open: int = 0
    _started_s: float = field(default_factory=time.monotonic)
    _waited_s: float = 0.0
    _waiting_since_s: float = 0.0
    _num_tokens: int = 0
    _paths: list[_Path] = field(default_factory=list)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While a call is being answered."""
        if not self.num_open:
            self._waiting_since_s = time.monotonic()
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._waited_s += time.monotonic() - self._waiting_since_s

    @property
    def waited_s(self) -> float:
        """For how long the agent has waited for answers so far; calls side by side count once."""
        now = time.monotonic() - self._waiting_since_s if self.num_open else 0.0
        return self._waited_s + now

    def check_budget(self) -> None:
        """Raise BudgetExhausted if nothing is left."""
        budget = self.spec.budget
        if len(self.calls) + self.num_open >= budget.max_calls:
            raise BudgetExhausted(f"{budget.max_calls} calls")
        if self._num_tokens >= budget.max_tokens:
            raise BudgetExhausted(f"{budget.max_tokens} sampled tokens")
        if time.monotonic() - self._started_s >= budget.seconds:
            raise BudgetExhausted(f"{budget.seconds:g} s")

    def sampling(self, requested: Sampling) -> Sampling:
        """What is used for the next call."""
        own = self.spec.sampling
        limit = min(own.max_tokens, requested.max_tokens)
        seed = None if own.seed is None else own.seed + len(self.calls)
        return Sampling(own.temperature, limit, seed)

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The ids for `messages`: the longest recorded conversation they continue, plus what is new.

        Text that an agent sends back is never tokenised again where it was recorded. History that was
        recorded nowhere is tokenised, and the call says it is not exact.
        """
        sent = tuple(messages)
        best: _Path | None = None
        for path in self._paths:
            if len(path.messages) < len(sent) and sent[: len(path.messages)] == path.messages:
                best = path if best is None or len(path.ids) >= len(best.ids) else best
        encode = self.spec.engine.encode
        if best is None:
            is_exact = all(message.role != "assistant" for message in sent)
            return Prompt("", (), encode(sent, is_continuation=False), sent, is_exact)
        rest = sent[len(best.messages) :]
        is_exact = all(message.role != "assistant" for message in rest)
        ids = encode(rest, is_continuation=True)
        return Prompt(best.call_id, best.ids, ids, rest, is_exact)

    def record(self, call: ModelCall, prompt: Prompt, messages: Sequence[Message]) -> None:
        """Remember a call that is on disk.

        An answer cut off at its length has no end-of-turn token, so no exact conversation continues it.
        """
        self.calls.append(call)
        self._num_tokens += len(call.generation.ids)
        if call.generation.finish == "stop":
            answer = Message("assistant", call.generation.text)
            ids = prompt.shared_ids + prompt.new_ids + call.generation.ids
            self._paths.append(_Path(call.call_id, (*messages, answer), ids))
