"""Lets sandboxes in: as many as the nodes have room for, as fast as they may start, fairly between groups.

It opens nothing itself. It is pure asyncio and reads no clock but the event loop's, so the same code runs in
a simulation. Demands and capacities are in whole units; what is promised is what a sandbox may use at most.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from math import inf

from katcore.errors import NoCapacityError
from katcore.sandbox.fair import FairQueue, Ticket
from katcore.sandbox.node import Node
from katcore.schema.capacity import Capacity, Demand

_LOOK = 16
"""How many groups are looked at when the first does not fit: smaller ones may pass it."""
_PATIENCE = 32
"""Passed so often, one has a node kept free for it, so that large ones do not starve."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Room on a node, until it is given back."""

    node: str
    demand: Demand
    group: str
    since_s: float
    on: Node


class Scheduler:
    """Places sandboxes on nodes. For one event loop."""

    def __init__(self, nodes: Mapping[str, Capacity], *, together: int = 8) -> None:
        self._nodes = {name: Node(name, capacity) for name, capacity in nodes.items()}
        self._queue: FairQueue[Place] = FairQueue(together)
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False

    @property
    def num_waiting(self) -> int:
        """How many wait for a place."""
        return len(self._queue)

    @asynccontextmanager
    async def placed(self, demand: Demand, group: str = "") -> AsyncIterator[Place]:
        """A place, while in the context.

        Raises:
            NoCapacityError: as `take`.
        """
        place = await self.take(demand, group)
        try:
            yield place
        finally:
            self.give_back(place)

    async def take(self, demand: Demand, group: str = "") -> Place:
        """Wait for a place; whoever has it gives it back.

        Raises:
            NoCapacityError: no node could hold it, were it empty.
        """
        self._refuse_impossible(demand)
        ticket: Ticket[Place] = Ticket(demand, group, asyncio.get_running_loop().create_future())
        self._queue.add(ticket)
        self._serve_soon()
        try:
            return await ticket.placed
        except asyncio.CancelledError:
            if ticket.placed.cancelled() or not ticket.placed.done():
                self._leave(ticket)
            elif not ticket.placed.exception():
                self.give_back(ticket.placed.result())
            raise

    def give_back(self, place: Place) -> None:
        """The sandbox is gone."""
        place.on.give_back(place.demand)
        self._queue.end(place.group)
        self._serve_soon()

    def has_room(self, demand: Demand) -> bool:
        """Whether one could start now, and nobody waits."""
        now_s = asyncio.get_running_loop().time()
        return not self._queue and any(
            node.has_room(demand) and node.starts_at_s(now_s) <= now_s
            for node in self._nodes.values()
        )

    def works(self, place: Place) -> None:
        """A sandbox was opened there: failures before were not the node's."""
        place.on.works()

    def rest(self, place: Place) -> None:
        """A sandbox failed in a way that is the node's: what comes next goes elsewhere, or waits."""
        place.on.rest(place.since_s, asyncio.get_running_loop().time())

    def add(self, name: str, capacity: Capacity) -> None:
        """A node came."""
        self._nodes[name] = Node(name, capacity)
        self._serve_soon()

    def lose(self, name: str) -> None:
        """A node is gone. Who has a place there still gives it back; who fits nowhere else is refused."""
        self._nodes.pop(name)
        for ticket in self._queue.all():
            if ticket.placed.done():  # cancelled, and about to leave
                continue
            try:
                self._refuse_impossible(ticket.demand)
            except NoCapacityError as error:
                self._leave(ticket)
                ticket.placed.set_exception(error)
        self._serve_soon()

    def _refuse_impossible(self, demand: Demand) -> None:
        if not any(node.could_hold(demand) for node in self._nodes.values()):
            most = max((node.capacity.memory_mib for node in self._nodes.values()), default=0)
            raise NoCapacityError(
                f"no node has room for {demand}: of {len(self._nodes)} nodes the largest has {most:g} MiB"
            )

    def _leave(self, ticket: Ticket[Place]) -> None:
        self._queue.remove(ticket)
        self._let_go(ticket)
        self._serve_soon()

    def _let_go(self, ticket: Ticket[Place]) -> None:
        for node in self._nodes.values():
            if node.held_for is ticket:
                node.held_for = None

    def _serve_soon(self) -> None:
        if not self._is_due and self._queue:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._serve)

    def _serve(self) -> None:
        """Place all that can be placed now, and come back when the next may start."""
        self._is_due = False
        loop = asyncio.get_running_loop()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        now_s, next_s = loop.time(), -inf
        while next_s < now_s:
            next_s = self._place_one(now_s)
        if next_s < inf:
            self._timer = loop.call_at(next_s, self._serve)

    def _place_one(self, now_s: float) -> float:
        """Place the first that fits: -inf. If none does: when one may, infinite if only room is missing."""
        next_s = inf
        before: list[Ticket[Place]] = []
        full: set[Demand] = set()
        for ticket in islice(self._queue.heads(), _LOOK):
            if ticket.placed.done():  # cancelled, and about to leave
                continue
            node: Node | None = None
            free_at_s = inf
            if ticket.demand not in full or ticket.passed >= _PATIENCE:
                node, free_at_s = self._node_for(ticket, now_s)
            if node:
                self._put(ticket, node, now_s)
                self._pass(before)
                return -inf
            next_s = min(next_s, free_at_s)
            full.add(ticket.demand)
            before.append(ticket)
        return next_s

    def _node_for(self, ticket: Ticket[Place], now_s: float) -> tuple[Node | None, float]:
        best, least, next_s = None, (inf, 0), inf
        for node in self._nodes.values():
            if node.held_for not in (None, ticket) or not node.has_room(ticket.demand):
                continue
            at_s = node.starts_at_s(now_s)
            if at_s > now_s:
                next_s = min(next_s, at_s)
            elif (load := node.load()) < least:
                best, least = node, load
        return best, next_s

    def _put(self, ticket: Ticket[Place], node: Node, now_s: float) -> None:
        self._let_go(ticket)
        node.take(ticket.demand, now_s)
        self._queue.place(ticket)
        ticket.placed.set_result(Place(node.name, ticket.demand, ticket.group, now_s, node))

    def _pass(self, tickets: list[Ticket[Place]]) -> None:
        for ticket in tickets:
            ticket.passed += 1
            if ticket.passed >= _PATIENCE:
                self._hold_one_for(ticket)

    def _hold_one_for(self, ticket: Ticket[Place]) -> None:
        nodes = [node for node in self._nodes.values() if node.could_hold(ticket.demand)]
        free = [node for node in nodes if node.held_for is None]
        if free and not any(node.held_for is ticket for node in nodes):
            min(free, key=Node.load).held_for = ticket
