"""`kat bench sandbox`: sandbox backends side by side, and a bare clone and exec beside them.

A start is from asking for a sandbox to the end of its first command. Cold: it is made then. Warm: it was made
before, so the figure is what a pool could save at best. Nothing sits between the benchmark and a backend: no
scheduler, no ledger.
"""

import asyncio
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from katcore.bench import floor
from katcore.bench.disk import machine, percentile, scratch
from katcore.bench.holding import Held, hold, in_turn
from katcore.errors import BenchError, KatError
from katcore.plugin import Plugins
from katcore.protocols import Sandbox, SandboxBackend
from katcore.schema.task import SandboxSpec

DOCKERFILE = "FROM host\nWORKDIR /work\n"
_COMMAND = ("true",)


@dataclass(frozen=True, slots=True)
class Settings:
    """Which backends, from what image, and how much of each.

    `starts` for each concurrency; `hold` sandboxes at once, each with a door where the backend has doors.
    """

    backends: tuple[str, ...] = ("local",)
    dockerfile: str = DOCKERFILE
    concurrency: tuple[int, ...] = (1, 8, 32)
    starts: int = 200
    hold: int = 1000
    floor: int = 1000

    @property
    def num_parts(self) -> int:
        """How many times a progress bar moves."""
        return 1 + len(self.backends) * (len(self.concurrency) + 1)


@dataclass(frozen=True, slots=True)
class Level:
    """So many at once. Milliseconds; `starts_per_s` are cold, each destroyed before the next."""

    concurrency: int
    cold_ms_p50: float
    cold_ms_p95: float
    warm_ms_p50: float
    warm_ms_p95: float
    starts_per_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """Of one backend; `error` if it cannot be used here."""

    levels: list[Level] = field(default_factory=list)
    held: Held | None = None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """The figures at the lowest concurrency, the highest rate, and what was held."""
        if self.error or not self.levels or self.held is None:
            return {"error": self.error}
        first = self.levels[0]
        return {
            "warm_ms_p50": first.warm_ms_p50,
            "cold_ms_p50": first.cold_ms_p50,
            "starts_per_s": max(level.starts_per_s for level in self.levels),
            "mib_each": self.held.mib_each,
            "alive": self.held.alive,
            "answering": self.held.answering,
            "seconds_1000": self.held.seconds_1000,
            "levels": [asdict(level) for level in self.levels],
            "held": asdict(self.held),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    machine: str
    backends: dict[str, Found]
    floor_per_s: float

    @property
    def is_sound(self) -> bool:
        """Whether all that lived answered."""
        held = [found.held for found in self.backends.values() if found.held]
        return all(item.alive == item.answering for item in held)

    def as_json(self) -> dict[str, Any]:
        """The report as plain values, by backend."""
        found = {name: item.as_json() for name, item in self.backends.items()}
        return {**found, "floor_per_s": self.floor_per_s, "machine": self.machine}


async def run(
    settings: Settings, root: Path, plugins: Plugins, step: Callable[[str], None]
) -> Report:
    """Measure, in a folder below `root` that is removed afterwards. `step` is told each part."""
    backends: dict[str, Found] = {}
    with scratch(root) as folder:
        environment = folder / "environment"
        environment.mkdir()
        (environment / "Dockerfile").write_text(settings.dockerfile)
        step("bare clone and exec")
        floor_per_s = await _floor(settings.floor, max(settings.concurrency))
        for name in settings.backends:
            backends[name] = await _measure(name, settings, environment, plugins, step)
    return Report(machine(), backends, round(floor_per_s, 1))


async def _floor(num: int, workers: int) -> float:
    command = (sys.executable, "-S", "-I", floor.__file__, str(num), str(workers))
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    said, error = await process.communicate()
    if process.returncode:
        raise BenchError(f"no process can be cloned: {error.decode(errors='replace')[-300:]}")
    return float(said)


async def _measure(
    name: str, settings: Settings, environment: Path, plugins: Plugins, step: Callable[[str], None]
) -> Found:
    spec = SandboxSpec(environment)
    found = Found()
    try:
        backend: SandboxBackend = plugins.make("sandbox", name, {})
    except KatError as error:
        return Found(error=str(error))
    try:
        async with backend.open(spec) as sandbox:  # builds the image, starts what has to be started
            await sandbox.exec(_COMMAND)
        for concurrency in settings.concurrency:
            step(f"{name}, {concurrency} at once")
            found.levels.append(await _level(backend, spec, concurrency, settings.starts))
        step(f"{name}, {settings.hold} held")
        return Found(found.levels, await hold(name, environment, settings.hold))
    except KatError as error:
        return Found(error=str(error))
    finally:
        await backend.close()


async def _level(
    backend: SandboxBackend, spec: SandboxSpec, concurrency: int, starts: int
) -> Level:
    cold: list[float] = []
    warm: list[float] = []

    async def one() -> None:
        asked_s = time.perf_counter()
        async with backend.open(spec) as sandbox:
            await sandbox.exec(_COMMAND)
            cold.append((time.perf_counter() - asked_s) * 1000)

    async def ready(sandbox: Sandbox) -> None:
        asked_s = time.perf_counter()
        await sandbox.exec(_COMMAND)
        warm.append((time.perf_counter() - asked_s) * 1000)

    started_s = time.perf_counter()
    await in_turn(one, starts, concurrency)
    seconds = time.perf_counter() - started_s
    while len(warm) < starts:
        async with AsyncExitStack() as opened:
            batch = min(concurrency, starts - len(warm))
            kept = [await opened.enter_async_context(backend.open(spec)) for _ in range(batch)]
            await asyncio.gather(*map(ready, kept))
    cold_p50, cold_p95, warm_p50, warm_p95 = (
        round(percentile(values, share) or 0.0, 3)
        for values in (cold, warm)
        for share in (0.5, 0.95)
    )
    rate = round(starts / seconds, 1)
    return Level(concurrency, cold_p50, cold_p95, warm_p50, warm_p95, rate)
