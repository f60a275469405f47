"""`kat bench fleet`: the scheduler with a fleet of nodes that does not exist, some of which are lost midway.

Nodes, sandboxes and time are made up; the scheduler, the rules for failures and the ledger are a run's.
All rollouts are asked for at once, twice as many as there is room for, so what is seen is who waits how long.
A run of the same seed is the same, but for how long it takes to compute.
"""

import asyncio
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from katcore.bench.disk import machine, percentile, scratch
from katcore.bench.virtual import run_virtual
from katcore.errors import EvictedError, SandboxError, StartTimeoutError
from katcore.retry import Next, rule_for
from katcore.sandbox.ledger import Ledger
from katcore.sandbox.process import Process
from katcore.sandbox.scheduler import Place, Scheduler
from katcore.schema.capacity import Capacity, Demand
from katcore.schema.lease import Holder, Lease

_STARTS_PER_S = 10.0
_START_S = (0.3, 3.0)
_FAILED_STARTS = 0.005
_SIZES_MIB = ((512.0, 0.8), (1024.0, 0.15), (4096.0, 0.05))
_MEDIAN_S, _SPREAD = 120.0, 0.8
_TRANSACTION_S = 0.25
"""How long the fleet's ledger takes for one transaction, in virtual time."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How many sandboxes on how many nodes, of which `lost` go; `group` rollouts are of one task."""

    sandboxes: int = 50_000
    nodes: int = 100
    lost: int = 10
    group: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of virtual time."""

    p50: float
    p95: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of some values; zeros of none."""
        p50, p95, most = (percentile(values, share) or 0.0 for share in (0.5, 0.95, 1.0))
        return cls(round(p50, 3), round(p95, 3), round(most, 3))


@dataclass(frozen=True, slots=True)
class LedgerLoad:
    """What the ledger wrote, for real, on the disk of this machine."""

    transactions: int
    rows: int
    seconds: float
    ms_p50: float
    ms_most: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found. `wait`: from asking to the start; `group_*`: of all rollouts of a task.

    `recovery`: of those on lost nodes, from the loss until they ran again. `scheduling_us` is CPU time for
    each sandbox that was placed, that of the simulation included.
    """

    machine: str
    settings: Settings
    virtual_s: float
    done: int
    given_up: int
    evicted: int
    most_open: int
    most_of_a_node: float
    wait: Spread
    group_wait: Spread
    group_span: Spread
    recovery: Spread
    failures: dict[str, int]
    ledger: LedgerLoad
    scheduling_us: float

    @property
    def is_sound(self) -> bool:
        """Whether none was lost, and no node ever had more than it may have."""
        return not self.given_up and self.most_of_a_node <= 1.0

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def run(settings: Settings, root: Path) -> Report:
    """Simulate; the ledger is in a folder below `root` that is removed afterwards."""
    with scratch(root) as folder:
        ledger = Ledger.at(folder / "leases.db")
        ledger.connect()
        try:
            return run_virtual(_Fleet(settings, ledger).run())
        finally:
            ledger.close()


@dataclass(slots=True)
class _Writer:
    """As `Register` writes leases: all that came meanwhile is one transaction."""

    ledger: Ledger
    holder: Holder
    wanted: dict[str, Lease] = field(default_factory=dict)
    written: dict[str, Lease] = field(default_factory=dict)
    waiting: list["asyncio.Future[None]"] = field(default_factory=list)
    rows: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    async def add(self, lease: Lease) -> None:
        self.wanted[lease.id] = lease
        self.waiting.append(asyncio.get_running_loop().create_future())
        await self.waiting[-1]

    async def work(self) -> None:
        while True:
            await asyncio.sleep(_TRANSACTION_S)
            if self.wanted.keys() == self.written.keys() and not self.waiting:
                continue
            waiting, self.waiting = self.waiting, []
            wanted = dict(self.wanted)
            self.rows += len(wanted.keys() ^ self.written.keys())
            started_s, cpu_s = time.perf_counter(), time.process_time()
            self.ledger.save(self.holder, self.written, wanted)
            self.seconds.append(time.perf_counter() - started_s)
            self.cpu_s += time.process_time() - cpu_s
            self.written = wanted
            for done in waiting:
                if not done.done():
                    done.set_result(None)

    def load(self) -> LedgerLoad:
        milliseconds = [seconds * 1000 for seconds in self.seconds]
        return LedgerLoad(
            len(self.seconds),
            self.rows,
            round(sum(self.seconds), 3),
            round(percentile(milliseconds, 0.5) or 0.0, 3),
            round(percentile(milliseconds, 1.0) or 0.0, 3),
        )


@dataclass(slots=True)
class _Rollout:
    name: str
    group: str
    demand: Demand
    seconds: float
    started_s: float = -1.0
    evicted_s: float = -1.0


class _Fleet:
    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._draw = random.Random(settings.seed)
        each = max(1, settings.sandboxes // (2 * settings.nodes))
        self._capacity = Capacity(
            sandboxes=each, memory_mib=max(4096.0, each * 800.0), starts_per_s=_STARTS_PER_S
        )
        names = [f"node-{number}" for number in range(settings.nodes)]
        self._scheduler = Scheduler(dict.fromkeys(names, self._capacity))
        holder = Holder("fleet", "none", "{}", "", "here", str(Process.of(os.getpid())))
        self._writer = _Writer(ledger, holder)
        # In the order in which they began, so that a run is the same each time.
        self._running: dict[str, dict[asyncio.Future[None], None]] = defaultdict(dict)
        self._lost: set[str] = set()
        self._half_done = asyncio.Event()
        self._open: Counter[str] = Counter()
        self._done = self._given_up = self._evicted = self._most_open = self._most = 0
        self._failures: Counter[str] = Counter()
        self._recovery: list[float] = []

    async def run(self) -> Report:
        cpu_s = time.process_time()
        loop = asyncio.get_running_loop()
        rollouts = list(self._rollouts())
        writing = asyncio.create_task(self._writer.work())
        losing = asyncio.create_task(self._lose())
        await asyncio.gather(*(self._persist(rollout) for rollout in rollouts))
        virtual_s = loop.time()
        for task in (writing, losing):
            task.cancel()
        await asyncio.gather(writing, losing, return_exceptions=True)
        load = self._writer.load()
        cpu_s = time.process_time() - cpu_s - self._writer.cpu_s
        return self._report(rollouts, virtual_s, load, cpu_s)

    def _rollouts(self) -> Iterator[_Rollout]:
        sizes, weights = zip(*_SIZES_MIB, strict=True)
        num = self._settings.sandboxes
        for first in range(0, num, self._settings.group):
            demand = Demand(self._draw.choices(sizes, weights)[0])
            for number in range(first, min(num, first + self._settings.group)):
                seconds = _MEDIAN_S * self._draw.lognormvariate(0, _SPREAD)
                yield _Rollout(f"rollout-{number}", f"task-{first}", demand, seconds)

    async def _lose(self) -> None:
        """When half of the rollouts are done, some nodes go, with all that is on them."""
        await self._half_done.wait()
        for number in range(self._settings.lost):
            name = f"node-{number}"
            self._scheduler.lose(name)
            self._lost.add(name)
            for ended in self._running.pop(name, {}):
                if not ended.done():
                    ended.set_exception(EvictedError(f"{name} is gone"))

    async def _persist(self, rollout: _Rollout) -> None:
        tries = 0
        while True:
            try:
                await self._once(rollout, f"{rollout.name}.{tries}")
            except SandboxError as error:
                tries += 1
                self._failures[type(error).__name__] += 1
                rule = rule_for(error)
                if tries > rule.times:
                    self._given_up += 1
                    return
                await asyncio.sleep(rule.delay_s(tries, self._draw))
            else:
                self._done += 1
                if self._done >= self._settings.sandboxes // 2:
                    self._half_done.set()
                return

    async def _once(self, rollout: _Rollout, lease: str) -> None:
        async with self._scheduler.placed(rollout.demand, rollout.group) as place:
            self._open[place.node] += 1
            self._most = max(self._most, self._open[place.node])
            self._most_open = max(self._most_open, self._open.total())
            try:
                await self._writer.add(Lease(lease, "fleet", rollout.name))
                await self._start(place)
                self._note(rollout)
                await self._work(rollout, place)
            except SandboxError as error:
                if rule_for(error).next is Next.ELSEWHERE:
                    self._scheduler.rest(place)
                raise
            finally:
                self._open[place.node] -= 1
                self._writer.wanted.pop(lease, None)

    async def _start(self, place: Place) -> None:
        await asyncio.sleep(self._draw.uniform(*_START_S))
        if self._draw.random() < _FAILED_STARTS:
            raise StartTimeoutError("it was not ready in time")
        self._scheduler.works(place)

    def _note(self, rollout: _Rollout) -> None:
        now_s = asyncio.get_running_loop().time()
        if rollout.started_s < 0:
            rollout.started_s = now_s
        if rollout.evicted_s >= 0:
            self._recovery.append(now_s - rollout.evicted_s)
            rollout.evicted_s = -1.0

    async def _work(self, rollout: _Rollout, place: Place) -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        running = self._running[place.node]
        running[ended] = None
        timer = loop.call_later(rollout.seconds, _end, ended)
        try:
            if place.node in self._lost:
                raise EvictedError(f"{place.node} is gone")
            await ended
        except EvictedError:
            self._evicted += 1
            rollout.evicted_s = loop.time()
            raise
        finally:
            timer.cancel()
            running.pop(ended, None)

    def _report(
        self, rollouts: list[_Rollout], virtual_s: float, load: LedgerLoad, cpu_s: float
    ) -> Report:
        starts: dict[str, list[float]] = defaultdict(list)
        for rollout in rollouts:
            if rollout.started_s >= 0:
                starts[rollout.group].append(rollout.started_s)
        placed = self._done + sum(self._failures.values())
        return Report(
            machine(),
            self._settings,
            round(virtual_s, 3),
            self._done,
            self._given_up,
            self._evicted,
            self._most_open,
            round(self._most / self._capacity.sandboxes, 3),
            Spread.of([at for times in starts.values() for at in times]),
            Spread.of([sum(times) / len(times) for times in starts.values()]),
            Spread.of([max(times) - min(times) for times in starts.values()]),
            Spread.of(self._recovery),
            dict(sorted(self._failures.items())),
            load,
            round(cpu_s / max(1, placed) * 1e6, 1),
        )


def _end(ended: "asyncio.Future[None]") -> None:
    if not ended.done():
        ended.set_result(None)
