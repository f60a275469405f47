"""One node: what is used of it, how fast it may start, and how long it rests after failures."""

from dataclasses import dataclass, field
from math import inf

from katcore.schema.capacity import Capacity, Demand

_REST_S, _LONGEST_REST_S = 0.5, 60.0


@dataclass(slots=True, eq=False)
class Node:
    """A node and its bookkeeping. Starts are a token bucket that holds what one second brings, or one."""

    name: str
    capacity: Capacity
    num_open: int = 0
    memory_mib: float = 0.0
    processes: float = 0.0
    descriptors: float = 0.0
    held_for: object = None
    """The ticket for which it is kept from all others."""
    _tokens: float = field(init=False)
    _at_s: float = -inf
    _rests_until_s: float = -inf
    _rested_s: float = -inf
    _num_failed: int = 0

    def __post_init__(self) -> None:
        self._tokens = self.burst

    @property
    def burst(self) -> float:
        """How many may start at once, after a pause."""
        return max(1.0, self.capacity.starts_per_s)

    def could_hold(self, demand: Demand) -> bool:
        """Whether it would have room if it were empty."""
        has = self.capacity
        return (
            demand.memory_mib <= has.memory_mib
            and demand.processes <= has.processes
            and demand.descriptors <= has.descriptors
            and has.sandboxes >= 1
        )

    def has_room(self, demand: Demand) -> bool:
        """Whether it has room now."""
        has = self.capacity
        return (
            self.memory_mib + demand.memory_mib <= has.memory_mib
            and self.num_open < has.sandboxes
            and self.processes + demand.processes <= has.processes
            and self.descriptors + demand.descriptors <= has.descriptors
        )

    def starts_at_s(self, now_s: float) -> float:
        """When one more may start."""
        self._refill(now_s)
        wait_s = (1.0 - self._tokens) / self.capacity.starts_per_s if self._tokens < 1.0 else 0.0
        return max(now_s + wait_s, self._rests_until_s)

    def take(self, demand: Demand, now_s: float) -> None:
        """One starts."""
        self._refill(now_s)
        # A timer may wake a hair too early; what it lacks is made up by the next.
        self._tokens -= 1.0
        self._change(demand, 1)

    def give_back(self, demand: Demand) -> None:
        """One ended."""
        self._change(demand, -1)

    def rest(self, since_s: float, now_s: float) -> None:
        """One failed that had been there since `since_s`: nothing starts for a while.

        It is twice as long each time until one works. Those that were there before a rest began are part of
        the same failure.
        """
        if since_s <= self._rested_s:
            return
        self._rested_s = now_s
        seconds = min(_LONGEST_REST_S, _REST_S * 2.0 ** min(self._num_failed, 60))
        self._num_failed += 1
        self._rests_until_s = now_s + seconds

    def works(self) -> None:
        """One was opened there."""
        self._num_failed = 0

    def load(self) -> tuple[float, int]:
        """How full it is, by what is scarcest."""
        has = self.capacity
        share = max(
            self.num_open / has.sandboxes,
            self.memory_mib / has.memory_mib,
            self.processes / has.processes,
            self.descriptors / has.descriptors,
        )
        return share, self.num_open

    def _refill(self, now_s: float) -> None:
        if self._tokens < self.burst:
            gained = (now_s - self._at_s) * self.capacity.starts_per_s
            self._tokens = min(self.burst, self._tokens + gained)
        self._at_s = now_s

    def _change(self, demand: Demand, sign: int) -> None:
        self.num_open += sign
        self.memory_mib += sign * demand.memory_mib
        self.processes += sign * demand.processes
        self.descriptors += sign * demand.descriptors
