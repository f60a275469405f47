"""Processes of a benchmark: one for each part, talked to in lines of JSON over its standard streams.

Each ends when its standard input does, so none outlives the benchmark, however that ends.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import orjson

from katcore.config import environment
from katcore.errors import BenchError

_LIMIT = 1 << 27
"""Bytes of the longest line: a client's report of a thousand streams has some megabytes."""
_GRACE_S = 10.0
_TAIL = 800


class Process:
    """A part of the benchmark, `python -m module`; `async with` starts and ends it."""

    def __init__(self, module: str, folder: Path) -> None:
        self._module = module
        self._log = folder / f"{module.rpartition('.')[2]}-{id(self):x}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LIMIT,
                env=environment(),
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process and self._process.stdin:
            self._process.stdin.close()
            await end(self._process)

    async def ask(self, question: object) -> Any:
        """Its answer to a line.

        Raises:
            BenchError: it ended instead; says its last words.
        """
        process = self._process
        assert process
        assert process.stdin
        assert process.stdout
        with suppress(ConnectionError):
            process.stdin.write(orjson.dumps(question) + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line.endswith(b"\n"):
            code = await process.wait()
            raise BenchError(f"{self._module} ended with {code}: {tail(self._log)}")
        return orjson.loads(line)


async def end(process: asyncio.subprocess.Process, number: signal.Signals | None = None) -> None:
    """Wait for a process to end, after a signal if one is given, and not for ever."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        if number:
            process.send_signal(number)
        try:
            await asyncio.wait_for(process.wait(), _GRACE_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def tail(log: Path) -> str:
    """The last words of a process."""
    return log.read_text(errors="replace").strip()[-_TAIL:] or "no output"


async def serve_lines(handle: Callable[[Any], Awaitable[object]]) -> None:
    """Be such a process: answer each line of standard input, until there are no more."""
    # What libraries print must not come between the lines.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    reader = asyncio.StreamReader(_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        data = memoryview(orjson.dumps(await handle(orjson.loads(line))) + b"\n")
        while data:
            data = data[answers.write(data) or 0 :]
