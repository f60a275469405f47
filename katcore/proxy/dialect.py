"""What all wire formats have in common: what is asked, what is answered, what goes wrong."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from katcore.schema.call import Generation, Message, Sampling, Tool

Kind = Literal[
    "invalid", "authentication", "not-found", "too-large", "busy", "context", "budget", "engine", "proxy"
]  # fmt: skip
"""`invalid`: the request; `context`: longer than the model's; `busy`: ask again later; `budget`: the rollout
has spent what it had; `engine`: the engine failed; `proxy`: we did."""

STATUS: Mapping[Kind, int] = {
    "invalid": 400,
    "authentication": 401,
    "not-found": 404,
    "too-large": 413,
    "busy": 429,
    "context": 400,
    # Agents go on asking for minutes after a 429 or 500; after a 400 they stop.
    "budget": 400,
    "engine": 503,
    "proxy": 500,
}
UNLIMITED = 1 << 30
COMMENT = b": ping\n\n"
"""An event of no meaning, by the rules of server-sent events."""


class Problem(Exception):  # noqa: N818 - an answer to the client, not a failure of ours
    """Why a request is not answered. The message goes to the client, in its dialect."""

    def __init__(self, kind: Kind, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, in nobody's dialect. `has_usage`: the end of a stream is to say what was used."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    requested: Sampling
    is_streamed: bool
    has_usage: bool = True


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, in nobody's dialect. `num_cached` of the `num_prompt` tokens were known from before."""

    id: str
    model: str
    created_s: float
    generation: Generation
    num_prompt: int
    num_cached: int
    num_sampled: int
    has_usage: bool = True


class Dialect(Protocol):
    """One wire format. A module will do."""

    PING: bytes
    """Tells a client that waits for a stream that the line is alive."""

    def parse(self, body: Mapping[str, Any]) -> Ask:
        """A request's body.

        Raises:
            Problem: `invalid`; says which field.
        """

    def answer(self, reply: Reply) -> dict[str, Any]:
        """The body of a whole answer."""

    def events(self, reply: Reply | Problem) -> Iterator[bytes]:
        """The server-sent events of a streamed answer, in the order that the official clients accept.

        A problem that comes when the status is sent already is an event, too.
        """

    def problem(self, problem: Problem) -> dict[str, Any]:
        """The body of an error."""


def server_sent(data: Mapping[str, Any], event: str = "") -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + orjson.dumps(data) + b"\n\n"


class Wire(BaseModel):
    """Base of what is read off the wire: unknown fields are let be."""

    model_config = ConfigDict(extra="ignore", frozen=True)


WireT = TypeVar("WireT", bound=Wire)


def validated(model: type[WireT], body: Mapping[str, Any]) -> WireT:
    """`body` as `model`.

    Raises:
        Problem: `invalid`; says which field.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        # Of the forms that a field may have, the one that fits furthest was meant.
        deepest = max(error.errors(), key=lambda found: len(found["loc"]))
        field = ".".join(map(str, deepest["loc"])) or "body"
        raise Problem("invalid", f"{field}: {deepest['msg']}") from error
