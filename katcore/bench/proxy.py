"""`kat bench proxy`: what the proxy adds to a call, beside the mock alone and LiteLLM, in the same run.

Client, mock, and each proxy are processes of their own with one worker each. Every number of streams is
measured in rounds that begin with another route each time, so that what else the machine does falls on all.
"""

import resource
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from katcore.bench import litellm
from katcore.bench.aim import Aim
from katcore.bench.client import Plan
from katcore.bench.disk import bare_fsync_ms, machine, percentile, scratch
from katcore.bench.mock import MockSettings
from katcore.bench.process import Process
from katcore.errors import BenchError
from katcore.trajectory.calls import read_calls

KATCORE, IDS = "katcore", "katcore-ids"
_ENGINES = {KATCORE: "upstream", IDS: "ids"}
_LEAST = 3
"""Requests of each stream and round, at least."""
_WARM_STREAMS, _WARM_REQUESTS = 8, 16
_FSYNCS = 100
_SPARE_FILES = 256

Open: TypeAlias = Callable[[int], Awaitable[dict[str, Any]]]
"""Where a route begins for so many streams: `url`, and a key for each."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. `litellm` is its program; None leaves it out.

    `requests` are those of each route at each number of streams, over all rounds; no stream has fewer than
    three in a round.
    """

    streams: tuple[int, ...] = (1, 16, 64, 256, 1024)
    requests: int = 1000
    rounds: int = 2
    chunks: int = 32
    delay_ms: float = 0.0
    is_streamed: bool = True
    cut_every: int = 0
    litellm: Path | None = None

    @property
    def num_runs(self) -> int:
        """How many times a progress bar moves."""
        routes = 1 + len(_ENGINES) + (self.litellm is not None)
        return len(self.streams) * self.rounds * routes


@dataclass(frozen=True, slots=True)
class Figures:
    """One route at one number of streams. Latency is to the last byte; `why` has what was lost, by reason."""

    num: int
    rps: float
    ms_p50: float | None
    ms_p95: float | None
    ms_p99: float | None
    lost: int
    why: dict[str, int]
    fsync_ms_p50: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One number of streams. What is added is the proxy's percentile less that of the mock alone.

    `fsync_ms_p50` is a bare write and fsync of a record's size, which is part of what is added. `lost` counts
    both engines of katcore.
    """

    streams: int
    added_ms_p50: float | None
    added_ms_p95: float | None
    added_ms_p99: float | None
    fsync_ms_p50: float | None
    rps: float
    rps_direct: float
    rps_litellm: float | None
    lost: int
    routes: dict[str, Figures]

    def added(self, route: str, at: str) -> float | None:
        """What a route adds to the mock alone, at `ms_p50`, `ms_p95` or `ms_p99`."""
        return _added(self.routes, route, at)


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found. `litellm` is its version, None if it was left out."""

    machine: str
    litellm: str | None
    rows: list[Row]
    aims: list[Aim]

    @property
    def is_lossless(self) -> bool:
        """Whether every answer of katcore's, and of the mock alone, came whole and is on record."""
        return not any(row.lost or row.routes["direct"].lost for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


@dataclass(slots=True)
class _Seen:
    """What a route did at one number of streams, in all rounds."""

    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    fsyncs_ms: list[float] = field(default_factory=list)

    def add(self, answer: dict[str, Any]) -> None:
        self.seconds += answer["seconds"]
        self.latencies_ms += answer["latencies_ms"]
        self.ids += answer["ids"]
        self.failures.update(answer["failures"])

    def figures(self, recorded: set[str] | None) -> Figures:
        """With `recorded`, an answer that is not in the log is lost, too."""
        failures = Counter(self.failures)
        if recorded is not None:
            missing = sum(name.removeprefix("chatcmpl-") not in recorded for name in self.ids)
            failures += Counter({"answered, but not in the log": missing})
        num = len(self.latencies_ms)
        return Figures(
            num,
            num / self.seconds if self.seconds else 0.0,
            percentile(self.latencies_ms, 0.50),
            percentile(self.latencies_ms, 0.95),
            percentile(self.latencies_ms, 0.99),
            failures.total(),
            dict(failures),
            percentile(self.fsyncs_ms, 0.5),
        )


async def run(
    settings: Settings, root: Path, report: Callable[[str], None], step: Callable[[str], None]
) -> Report:
    """Measure, with the logs in a folder below `root` that is removed afterwards. `step` is told each run.

    Raises:
        BenchError: a part did not start or died, or too few files may be open.
    """
    _allow_files(2 * max(settings.streams) + _SPARE_FILES)
    with scratch(root) as folder:
        async with AsyncExitStack() as held:
            bench = _Bench(settings, folder)
            await bench.start(held, report)
            seen = await bench.measure(step)
        recorded = {
            route: {call.call_id for call in read_calls(_log(folder, route))} for route in _ENGINES
        }
    rows = [_row(num, routes, recorded) for num, routes in seen.items()]
    version = litellm.version(settings.litellm) if settings.litellm else None
    return Report(machine(), version, rows, _aims(rows))


class _Bench:
    """The parts that run, and the routes through them."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._client = Process("katcore.bench.client", folder)
        self._routes: dict[str, Open] = {}
        self._next = 0

    async def start(self, held: AsyncExitStack, report: Callable[[str], None]) -> None:
        """Start all parts, and warm them up."""
        settings = self._settings
        await held.enter_async_context(self._client)
        mock = await held.enter_async_context(Process("katcore.bench.mock", self._folder))
        given = MockSettings(settings.chunks, settings.delay_ms, settings.cut_every)
        url: str = (await mock.ask(asdict(given)))["url"]
        self._routes["direct"] = _keyless(url)
        for route, engine in _ENGINES.items():
            report(f"starting {route}")
            part = await held.enter_async_context(Process("katcore.bench.behind", self._folder))
            log = str(_log(self._folder, route))
            await part.ask({"log": log, "engine": engine, "url": url, "chunks": settings.chunks})
            self._routes[route] = _sessions(part)
        if settings.litellm:
            report("starting LiteLLM")
            serving = litellm.serving(settings.litellm, url, self._folder)
            self._routes["litellm"] = _keyless(await held.enter_async_context(serving))
        for route in self._routes:
            await self._ask(route, _WARM_STREAMS, _WARM_REQUESTS)

    async def measure(self, step: Callable[[str], None]) -> dict[int, dict[str, _Seen]]:
        """What each route did, by number of streams."""
        names = list(self._routes)
        found: dict[int, dict[str, _Seen]] = {}
        for num in self._settings.streams:
            seen = found[num] = {name: _Seen() for name in names}
            wanted = -(-self._settings.requests // (num * self._settings.rounds))
            for turn in range(self._settings.rounds):
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    step(f"{num} streams, {name}")
                    seen[name].add(await self._ask(name, num, max(_LEAST, wanted)))
                    if name in _ENGINES:
                        seen[name].fsyncs_ms += self._fsyncs(name)
        return found

    async def _ask(self, route: str, num_streams: int, requests: int) -> dict[str, Any]:
        target = await self._routes[route](num_streams)
        plan = Plan(
            target["url"],
            target["keys"],
            requests,
            self._next,
            self._settings.chunks,
            self._settings.is_streamed,
        )
        self._next += requests + 1
        answer: dict[str, Any] = await self._client.ask(asdict(plan))
        return answer

    def _fsyncs(self, route: str) -> list[float]:
        """The bound for records of the size of those in the log."""
        log = _log(self._folder, route)
        with log.open("rb") as file:
            num = sum(1 for _ in file)
        return bare_fsync_ms(self._folder, log.stat().st_size // max(1, num), _FSYNCS)


def _keyless(url: str) -> Open:
    async def opened(num: int) -> dict[str, Any]:
        return {"url": url, "keys": ["no-key"] * num}

    return opened


def _sessions(part: Process) -> Open:
    async def opened(num: int) -> dict[str, Any]:
        target: dict[str, Any] = await part.ask({"sessions": num})
        return target

    return opened


def _log(folder: Path, route: str) -> Path:
    return folder / f"{route}.jsonl"


def _row(num: int, seen: dict[str, _Seen], recorded: dict[str, set[str]]) -> Row:
    routes = {name: item.figures(recorded.get(name)) for name, item in seen.items()}
    return Row(
        num,
        _added(routes, KATCORE, "ms_p50"),
        _added(routes, KATCORE, "ms_p95"),
        _added(routes, KATCORE, "ms_p99"),
        routes[KATCORE].fsync_ms_p50,
        routes[KATCORE].rps,
        routes["direct"].rps,
        routes["litellm"].rps if "litellm" in routes else None,
        sum(routes[name].lost for name in _ENGINES),
        routes,
    )


def _added(routes: dict[str, Figures], route: str, at: str) -> float | None:
    ours, alone = getattr(routes[route], at), getattr(routes["direct"], at)
    return None if ours is None or alone is None else float(ours - alone)


def _aims(rows: list[Row]) -> list[Aim]:
    """What is aimed at, as far as it was measured, for both engines."""
    by_streams = {row.streams: row for row in rows}
    aims: list[Aim] = []
    for route in _ENGINES:
        if row := by_streams.get(1):
            added, fsync = row.added(route, "ms_p50"), row.routes[route].fsync_ms_p50
            if added is not None and fsync is not None:
                what = f"{route}: ms added at 1 stream, p50, less a bare fsync"
                aims.append(Aim.at_most(what, added - fsync, 3.0))
        if row := by_streams.get(64):
            aims += _throughput_aims(route, row)
        if row := by_streams.get(1024):
            what = f"{route}: answers lost at 1024 streams"
            aims.append(Aim.at_most(what, row.routes[route].lost, 0))
    return aims


def _throughput_aims(route: str, row: Row) -> list[Aim]:
    rps, aims = row.routes[route].rps, []
    if row.rps_direct:
        what = f"{route}: requests/s at 64 streams, as a share of direct"
        aims.append(Aim.at_least(what, rps / row.rps_direct, 0.4))
    if row.rps_litellm:
        for times, name in ((4.0, ""), (10.0, ", the stretch")):
            what = f"{route}: requests/s at 64 streams over LiteLLM's{name}"
            aims.append(Aim.at_least(what, rps / row.rps_litellm, times))
    return aims


def _allow_files(num: int) -> None:
    """Let this process and what it starts open `num` files.

    Raises:
        BenchError: the machine allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < num:
        raise BenchError(
            f"{num} open files are needed, and the hard limit is {hard}; raise it (`ulimit -Hn`), or take"
            " fewer streams"
        )
    if soft != resource.RLIM_INFINITY and soft < num:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num, hard))
