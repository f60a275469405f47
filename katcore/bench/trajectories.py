"""`kat bench trajectories`: what recording costs, how large a log is, and how long its tree takes.

The session is a made-up agent's, captured by the proxy's own code. Beside what the log writes is the bound:
the same bytes in the same portions by a bare write and fsync, in the same run.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from katcore.bench.agent import Agent
from katcore.bench.aim import Aim
from katcore.bench.body import DIALECTS
from katcore.bench.disk import machine, scratch
from katcore.bench.process import Process
from katcore.schema.call import ModelCall
from katcore.schema.codec import to_json
from katcore.trajectory.calls import CallLog, read_calls, write_all

_WRITERS = (1, 64)
_MEMORY = tuple(path for path in (Path("/dev/shm"),) if path.is_dir())
"""A file system in memory, where an fsync costs nothing: what is left is what our code costs."""
_BUILDS = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """How many calls the tree has, how many turns the logs have, how often writing is repeated."""

    calls: int = 1000
    turns: int = 200
    rounds: int = 3

    @property
    def num_parts(self) -> int:
        """How many times a progress bar moves."""
        return 2 + len(_WRITERS) + len(DIALECTS)


@dataclass(frozen=True, slots=True)
class Written:
    """So many calls at once that wait for the log; `bare` is the bound. Unsynced is in memory."""

    writers: int
    is_synced: bool
    calls_per_s: float
    gb_per_s: float
    bare_calls_per_s: float
    bare_gb_per_s: float


@dataclass(frozen=True, slots=True)
class Built:
    """The tree of one session, read from its log. Seconds are the middle of three processes'."""

    turns: int
    tokens: int
    tree_tokens: int
    roles: dict[str, int]
    read_s: float
    build_s: float
    tree_s: float
    peak_mib: float
    log_bytes: int

    @property
    def seconds(self) -> float:
        """From the log to the token tree."""
        return self.read_s + self.build_s + self.tree_s


@dataclass(frozen=True, slots=True)
class Logged:
    """One plain conversation in one dialect.

    `unique_bytes` is what came over the wire, each part once: the last request, which holds all that was
    said before, and of each answer its text, ids and log-probabilities. `sent_bytes` are all requests.
    """

    dialect: str
    turns: int
    log_bytes: int
    unique_bytes: int
    text_bytes: int
    sent_bytes: int

    @property
    def ratio(self) -> float:
        """The log over the unique bytes."""
        return self.log_bytes / self.unique_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    machine: str
    written: list[Written]
    built: Built
    logged: list[Logged]
    aims: list[Aim]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        built = {**asdict(self.built), "seconds": self.built.seconds}
        logged = [{**asdict(item), "ratio": item.ratio} for item in self.logged]
        return {**asdict(self), "built": built, "logged": logged}


async def run(settings: Settings, root: Path, step: Callable[[str], None]) -> Report:
    """Measure, in a folder below `root` that is removed afterwards. `step` is told each part."""
    with scratch(root) as folder:
        step("capturing a session")
        log = folder / "session.jsonl"
        agent = Agent(log, "chat-completions", 0)
        await agent.work(settings.calls)
        agent.close()
        calls = list(read_calls(log))
        written = []
        for writers in _WRITERS:
            step(f"writing, {writers} at once")
            for place in (folder, *_MEMORY):
                with scratch(place) as own:
                    written.append(await _written(calls, own, writers, settings.rounds))
        step("building the tree")
        built = await _built(log, folder)
        logged = []
        for dialect in DIALECTS:
            step(f"a log of {settings.turns} turns, {dialect}")
            logged.append(await _logged(dialect, settings.turns, folder))
    return Report(machine(), written, built, logged, _aims(built, logged))


async def _written(calls: Sequence[ModelCall], folder: Path, writers: int, rounds: int) -> Written:
    lines = [to_json(call) + b"\n" for call in calls]
    num_bytes = sum(map(len, lines)) * rounds
    ours_s = bare_s = 0.0
    for turn in range(rounds):
        ours_s += await _append(calls, folder / f"ours-{turn}", writers)
        bare_s += await asyncio.to_thread(_bare, lines, folder / f"bare-{turn}", writers)
    num = len(calls) * rounds
    return Written(
        writers,
        folder.parent not in _MEMORY,
        num / ours_s,
        num_bytes / ours_s / 1e9,
        num / bare_s,
        num_bytes / bare_s / 1e9,
    )


async def _append(calls: Sequence[ModelCall], path: Path, writers: int) -> float:
    """Seconds that the call log takes for calls that wait `writers` at a time."""
    log = CallLog(path)
    started_s = time.perf_counter()
    for at in range(0, len(calls), writers):
        await asyncio.gather(*(log.append(call) for call in calls[at : at + writers]))
    seconds = time.perf_counter() - started_s
    log.close()
    return seconds


def _bare(lines: Sequence[bytes], path: Path, writers: int) -> float:
    """Seconds that the disk takes for the same bytes in the same portions."""
    portions = [b"".join(lines[at : at + writers]) for at in range(0, len(lines), writers)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    started_s = time.perf_counter()
    for portion in portions:
        write_all(file, portion)
        os.fdatasync(file)
    seconds = time.perf_counter() - started_s
    os.close(file)
    return seconds


async def _built(log: Path, folder: Path) -> Built:
    found: list[dict[str, Any]] = []
    for _ in range(_BUILDS):
        async with Process("katcore.bench.tree", folder) as process:
            found.append(await process.ask({"log": str(log)}))
    middle = {
        name: median(item[name] for item in found)
        for name in ("read_s", "build_s", "tree_s", "peak_mib")
    }
    return Built(**{**found[0], **middle}, log_bytes=_size(log))


async def _logged(dialect: str, turns: int, folder: Path) -> Logged:
    log = folder / f"{dialect}.jsonl"
    agent = Agent(log, dialect, 1)
    sent = await agent.converse(turns)
    agent.close()
    text = len(orjson.dumps(agent.last_body)) + len(agent.calls[-1].generation.text)
    sampled = sum(
        len(orjson.dumps([call.generation.ids, call.generation.logprobs])) for call in agent.calls
    )
    return Logged(dialect, turns, _size(log), text + sampled, text, sent)


def _size(path: Path) -> int:
    return path.stat().st_size


def _aims(built: Built, logged: Sequence[Logged]) -> list[Aim]:
    what = f"s from the log to the token tree, {built.turns} calls, {built.tree_tokens} tokens"
    return [
        Aim.at_most(what, built.seconds, 2.0),
        *(
            Aim.at_most(
                f"log over unique bytes, {item.turns} turns, {item.dialect}", item.ratio, 3.0
            )
            for item in logged
        ),
    ]
