"""What importers share: turns put together one by one, and errors that say where."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from katcore.errors import StageError
from katcore.schema.call import Message, Tool
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Turn, TurnRole, Verdict

NO_VERDICT = Verdict(None, "imported, without a verdict")


@dataclass(slots=True)
class Thread:
    """A conversation that is being read: its last turn, and what was said after it."""

    role: TurnRole = "main"
    last: int = -1
    num_messages: int = 0
    pending: list[Message] = field(default_factory=list)


class Draft:
    """The turns of one session in call order."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def answer(
        self,
        thread: Thread,
        message: Message,
        *,
        model: str,
        at_s: float = 0.0,
        tools: tuple[Tool, ...] | None = None,
    ) -> None:
        """Add a turn that was asked with all that is pending in `thread`, and answered `message`."""
        turn = Turn(
            parent=thread.last,
            num_shared_messages=thread.num_messages,
            num_shared=0,
            prompt_ids=(),
            ids=(),
            logprobs=(),
            messages=tuple(thread.pending),
            text=message.content,
            policy_version=model,
            origin="api",
            role=thread.role,
            reasoning=message.reasoning,
            tool_calls=message.tool_calls,
            tools=tools,
            started_s=at_s,
        )
        thread.num_messages += len(thread.pending) + 1
        thread.pending = []
        thread.last = len(self.turns)
        self.turns.append(turn)

    def rollout(self, session_id: str, **facts: Any) -> Rollout:
        """The rollout that all turns make."""
        trajectory = Trajectory(session_id, tuple(self.turns))
        made = Rollout(
            id=session_id,
            task_id=session_id,
            domain="",
            group=session_id,
            attempt=0,
            outcome=Outcome.SCORED,
            trajectory=trajectory,
            verdict=NO_VERDICT,
        )
        return replace(made, **facts)


def as_record(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        StageError: it is none; says where.
    """
    try:
        value = orjson.loads(data)
    except ValueError as error:
        raise StageError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StageError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def wanted(record: Any, name: str, kind: type, where: str) -> Any:
    """A field of an object that has to be there.

    Raises:
        StageError: it is missing, or of another kind; says where.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise StageError(f"{where}: expected {name!r} ({kind.__name__}), found {found}")
    return value


@contextmanager
def fitting(where: str) -> Iterator[None]:
    """Say where, if what is read inside is not of the form that it should have.

    Raises:
        StageError: it is not.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise StageError(f"{where}: does not fit: {error!r}") from error


def read_bytes(path: Path) -> bytes:
    """A file.

    Raises:
        StageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StageError(f"{path}: cannot be read: {error.strerror}") from error


def seconds(timestamp: Any) -> float:
    """Seconds since the epoch of an ISO 8601 time; 0 if it is none."""
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except (TypeError, ValueError):
        return 0.0
