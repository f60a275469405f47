"""The call log: append-only, one JSON line per model call, on disk before the answer is released.

Many calls that wait together share one write and one fsync (group commit). A process that dies in the
middle of a line leaves a torn last line, which readers drop: its answer was never released.
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from katcore.errors import ProxyError
from katcore.schema.call import CallFailure, ModelCall
from katcore.schema.codec import from_json, to_json

_FAILURE = b'{"failure":'


class CallLog:
    """Appends calls to a file. One event loop, one writer per file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._pending: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        drop_torn_line(path)

    async def append(self, call: ModelCall | CallFailure) -> None:
        """Return once the call is on disk.

        Raises:
            ProxyError: the disk refused it (full, gone); the answer must not be released.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((to_json(call) + b"\n", done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        await done

    def close(self) -> None:
        """Close the file; call it when nothing is pending."""
        os.close(self._file)

    async def _flush(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await asyncio.to_thread(self._write, b"".join(line for line, _ in batch))
            except OSError as error:
                failure = ProxyError(f"{self._path}: the call log cannot be written: {error}")
                for _, done in batch:
                    if not done.cancelled():
                        done.set_exception(failure)
                continue
            for _, done in batch:
                if not done.cancelled():
                    done.set_result(None)

    def _write(self, data: bytes) -> None:
        start = os.fstat(self._file).st_size
        try:
            write_all(self._file, data)
            os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, start)
            raise


def write_all(file: int, data: bytes) -> None:
    """Write all of `data`, in as many pieces as the kernel takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def read_calls(path: Path) -> Iterator[ModelCall]:
    """The calls of a log in order, one at a time; a torn last line is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and not line.startswith(_FAILURE):
                yield from_json(ModelCall, line)


def read_failures(path: Path) -> Iterator[CallFailure]:
    """The requests of a log that got no answer, in order."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and line.startswith(_FAILURE):
                yield from_json(CallFailure, line)


def calls_by_session(path: Path) -> dict[str, list[ModelCall]]:
    """The calls of a log, by session id."""
    sessions: dict[str, list[ModelCall]] = {}
    for call in read_calls(path):
        sessions.setdefault(call.session_id, []).append(call)
    return sessions


def drop_torn_line(path: Path) -> None:
    """Remove what follows the last line end of a file."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            file.truncate(end)
