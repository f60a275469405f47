"""Many sandboxes at once: how many live, how many of them answer, what each costs.

They are held by several processes (`shard`), as one has too few descriptors for thousands.
"""

import asyncio
import json
import os
import resource
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from katcore.errors import BenchError, KatError
from katcore.protocols import Sandbox, SandboxBackend, SupportsDoor
from katcore.schema.task import SandboxSpec

_OPENING = 16
"""How many are opened at once by all shards together."""
_DESCRIPTORS = 3
"""Of one sandbox: its channel and its door; and, while it starts, its own end of the channel."""
_KEPT_DESCRIPTORS = 256
_KEPT_MIB, _ASKED_MIB = 2048, 0.75
"""What is left to the machine, besides what each of them takes when it is asked: none is opened with less."""
_FEW = 500
"""So many are one shard's."""


@dataclass(frozen=True, slots=True)
class Held:
    """Many at once: how many live, how many of them answered a command, and what each costs.

    `mib_each` is what the machine had less of available, for each, when none had been asked for anything, and
    `mib_asked` when all had been; `seconds_1000` the time to open a thousand at that pace. `why` is what
    stopped it.
    """

    alive: int
    answering: int
    doors: int
    shards: int
    mib_each: float
    mib_asked: float
    seconds: float
    seconds_1000: float
    why: str = ""


def shares(num: int) -> list[int]:
    """How many each shard holds: as its descriptors allow, and on all cores where it is many."""
    each = max(
        1, (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - _KEPT_DESCRIPTORS) // _DESCRIPTORS
    )
    shards = max(-(-num // each), os.cpu_count() or 1 if num > _FEW else 1)
    return [num // shards + (number < num % shards) for number in range(shards)]


async def hold(backend: str, environment: Path, num: int) -> Held:
    """Open up to `num`, with a door each where there are doors; then ask all of them, and close them.

    Raises:
        BenchError: a shard ends before its time.
    """
    parts = shares(num)
    shards = [await _start() for _ in parts]
    try:
        given = {"backend": backend, "environment": str(environment), "shards": len(parts)}
        opening = max(1, _OPENING // len(parts))
        await _tell(shards, *({**given, "num": part, "opening": opening} for part in parts))
        before = psutil.virtual_memory().available
        started_s = time.perf_counter()
        opened = await _tell(shards)
        seconds = time.perf_counter() - started_s
        idle = max(0, before - psutil.virtual_memory().available)
        answered = await _tell(shards)
        asked = max(0, before - psutil.virtual_memory().available)
    finally:
        for shard in shards:
            assert shard.stdin
            shard.stdin.close()
        await asyncio.gather(*(shard.wait() for shard in shards))
    alive = sum(item["alive"] for item in opened)
    return Held(
        alive,
        sum(item["answering"] for item in answered),
        sum(item["doors"] for item in opened),
        len(parts),
        round(idle / max(1, alive) / (1 << 20), 3),
        round(asked / max(1, alive) / (1 << 20), 3),
        round(seconds, 2),
        round(1000 * seconds / max(1, alive), 1),
        next((item["why"] for item in opened if item["why"]), ""),
    )


async def _start() -> Process:
    command = (sys.executable, "-m", "katcore.bench.shard")
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)


async def _tell(shards: Sequence[Process], *lines: dict[str, Any]) -> list[dict[str, Any]]:
    """Give each shard its line, or an empty one; what they say to that."""
    for shard, line in zip(shards, lines or [{}] * len(shards), strict=True):
        assert shard.stdin
        shard.stdin.write(json.dumps(line).encode() + b"\n")
    found = []
    for shard in shards:
        assert shard.stdout
        said = await shard.stdout.readline()
        if not said:
            raise BenchError("a shard of the sandboxes that are held has ended")
        found.append(json.loads(said))
    return found


async def in_turn(work: Callable[[], Awaitable[None]], times: int, concurrency: int) -> None:
    """So many times, so many at once."""
    left = iter(range(times))

    async def worker() -> None:
        for _ in left:
            await work()

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def fill(
    backend: SandboxBackend, spec: SandboxSpec, share: dict[str, Any], opened: AsyncExitStack
) -> tuple[list[Sandbox], str]:
    """The open sandboxes of a share, and what stopped it."""
    kept: list[Sandbox] = []
    why: list[str] = []

    async def one() -> None:
        wanted_mib = int(_KEPT_MIB + _ASKED_MIB * share["shards"] * len(kept))
        if not why and psutil.virtual_memory().available < wanted_mib << 20:
            why.append(f"less than {wanted_mib} MiB of memory are available")
        if why:
            return
        try:
            kept.append(await opened.enter_async_context(backend.open(spec)))
        except (KatError, OSError) as error:
            why.append(f"{type(error).__name__}: {error}")

    await in_turn(one, share["num"], share["opening"])
    return kept, "".join(why[:1])


async def with_door(backend: SandboxBackend, spec: SandboxSpec) -> SandboxSpec:
    """The spec with a door, where sandboxes have doors. The first opening makes all ready that has to be."""
    async with backend.open(spec) as sandbox:
        has_door = isinstance(sandbox, SupportsDoor)
    return SandboxSpec(spec.environment, has_door=has_door)


def take_doors(kept: Sequence[Sandbox], opened: AsyncExitStack) -> int:
    """How many have a door of their own."""
    doors = [sandbox.door()[0] for sandbox in kept if isinstance(sandbox, SupportsDoor)]
    for door in doors:
        opened.callback(door.close)
    return len(doors)


async def ask_all(kept: Sequence[Sandbox]) -> int:
    """How many answer: each writes a word of its own into its root, and reads it in a process of its own."""

    async def one(number: int, sandbox: Sandbox) -> bool:
        with suppress(KatError, OSError):
            await sandbox.write("/root/word", str(number).encode())
            result = await sandbox.exec(["cat", "/root/word"])
            return result.stdout == str(number).encode()
        return False

    waiting = iter(enumerate(kept))
    answers: list[bool] = []

    async def worker() -> None:
        for number, sandbox in waiting:
            answers.append(await one(number, sandbox))

    await asyncio.gather(*(worker() for _ in range(4 * (os.cpu_count() or 1))))
    return sum(answers)
