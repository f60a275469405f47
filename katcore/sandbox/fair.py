"""Who is next: groups take turns, so that none starves and the sandboxes of one tend to run together.

A group keeps the front until it has been given `together` places, then goes to the back if it wants more.
One that comes back while it still has some open, and with places of its turn left, comes back to the front:
an agent's work is judged before the next group begins.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from katcore.schema.capacity import Demand

PlacedT = TypeVar("PlacedT")


@dataclass(slots=True, eq=False)
class Ticket(Generic[PlacedT]):
    """One who waits. `passed` counts those that came later and were placed before."""

    demand: Demand
    group: str
    placed: "asyncio.Future[PlacedT]"
    passed: int = 0


@dataclass(slots=True)
class _Group(Generic[PlacedT]):
    waiting: deque[Ticket[PlacedT]] = field(default_factory=deque)
    given: int = 0
    num_open: int = 0


class FairQueue(Generic[PlacedT]):
    """Tickets in the order in which they are to be placed."""

    def __init__(self, together: int) -> None:
        self._together = together
        self._groups: dict[str, _Group[PlacedT]] = {}
        self._line: OrderedDict[str, None] = OrderedDict()
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def add(self, ticket: Ticket[PlacedT]) -> None:
        """Let it wait behind its group."""
        group = self._groups.setdefault(ticket.group, _Group())
        group.waiting.append(ticket)
        self._num += 1
        if ticket.group not in self._line:
            self._line[ticket.group] = None
            if group.num_open and group.given % self._together:
                self._line.move_to_end(ticket.group, last=False)

    def heads(self) -> Iterator[Ticket[PlacedT]]:
        """The first of each group."""
        return (self._groups[name].waiting[0] for name in self._line)

    def all(self) -> list[Ticket[PlacedT]]:
        """All that wait."""
        return [ticket for name in self._line for ticket in self._groups[name].waiting]

    def place(self, ticket: Ticket[PlacedT]) -> None:
        """It got its place; `end` follows when it gives it back."""
        group = self._groups[ticket.group]
        group.given += 1
        group.num_open += 1
        self.remove(ticket)
        if ticket.group in self._line and group.given % self._together == 0:
            self._line.move_to_end(ticket.group)

    def remove(self, ticket: Ticket[PlacedT]) -> None:
        """It waits no longer."""
        group = self._groups[ticket.group]
        group.waiting.remove(ticket)
        self._num -= 1
        if not group.waiting:
            del self._line[ticket.group]
            self._forget(ticket.group)

    def end(self, name: str) -> None:
        """A group gave a place back."""
        self._groups[name].num_open -= 1
        self._forget(name)

    def _forget(self, name: str) -> None:
        group = self._groups[name]
        if not group.waiting and not group.num_open:
            del self._groups[name]
