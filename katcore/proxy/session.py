"""Sessions: one API key, one rollout, one budget, and all that was said in it."""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from katcore.errors import InfrastructureError
from katcore.protocols import Engine
from katcore.proxy.conversation import Conversations, Prompt
from katcore.schema.call import Message, ModelCall, Sampling, Tool
from katcore.trajectory.raw import Requests

MODEL = "policy"


@dataclass(frozen=True, slots=True)
class Budget:
    """What one rollout may spend. Agents ignore their own limits, so these are held here.

    `call_seconds` is how long the engine may take over one answer; longer is the engine's failure.
    """

    max_calls: int = 64
    max_tokens: int = 65536
    seconds: float = 3600.0
    call_seconds: float = 900.0


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a session is opened with.

    `sampling` is the run's. In training it stands above whatever the agent asks for, and its `max_tokens`
    bounds the answer; otherwise the agent has its own way, within that bound.
    """

    session_id: str
    engine: Engine
    sampling: Sampling
    budget: Budget = Budget()
    model: str = MODEL
    is_training: bool = True


class BudgetExhausted(Exception):  # noqa: N818 - an expected end, not a failure
    """The session has spent its budget; the agent is told to stop."""


@dataclass(slots=True)
class Session:
    """The state of one rollout at the proxy."""

    spec: SessionSpec
    key: str = field(default_factory=lambda: f"kat-{secrets.token_urlsafe(24)}")
    calls: list[ModelCall] = field(default_factory=list)
    failure: InfrastructureError | None = None
    num_asked: int = 0
    spent_s: float = 0.0
    """When the agent was first told that its budget is spent, on the monotonic clock; 0 if it was not."""
    bodies: Requests = field(default_factory=Requests)
    num_open: int = 0
    _started_s: float = field(default_factory=time.monotonic)
    _waited_s: float = 0.0
    _waiting_since_s: float = 0.0
    _num_tokens: int = 0
    _conversations: Conversations = field(init=False)

    def __post_init__(self) -> None:
        self._conversations = Conversations(self.spec.engine)

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
        if not self.spec.is_training:
            return replace(requested, max_tokens=limit)
        seed = None if own.seed is None else own.seed + len(self.calls)
        return replace(own, max_tokens=limit, seed=seed)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Prompt:
        """See `Conversations.prompt`."""
        return self._conversations.prompt(messages, tools)

    def record(self, call: ModelCall, prompt: Prompt) -> None:
        """Remember a call that is on disk."""
        self.calls.append(call)
        self._num_tokens += len(call.generation.ids)
        self._conversations.record(call, prompt)
