"""Segments: what a collection keeps, rollout by rollout, under a root that outlives its machine.

    <root>/<rollout id>.jsonl.gz     the lines of its calls in the call log, then the rollout itself

The root is a folder or any URI that fsspec can write, such as `s3://`; most need a package of their own, with
credentials where it looks for them. A segment is whole or not there. The call log and the rollouts of a
folder can be made again from their segments, byte for byte but for the order.
"""

import gzip
import zlib
from pathlib import Path
from urllib.parse import quote, unquote

import fsspec
import orjson

from katcore.errors import ConfigError, StageError
from katcore.schema.codec import from_json
from katcore.schema.rollout import Rollout

_SUFFIX = ".jsonl.gz"


class CallLines:
    """The lines of a growing call log, by session; what was taken is forgotten."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._places: dict[str, list[tuple[int, int]]] = {}

    def sessions(self) -> set[str]:
        """All that were not taken."""
        self._read_on()
        return set(self._places)

    def take(self, session_id: str) -> bytes:
        """All lines of a session that has ended."""
        self._read_on()
        with self._path.open("rb") as file:
            lines = []
            for offset, length in self._places.pop(session_id, ()):
                file.seek(offset)
                lines.append(file.read(length))
        return b"".join(lines)

    def _read_on(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                record = orjson.loads(line)
                place = (self._offset, len(line))
                self._places.setdefault(record["session_id"], []).append(place)
                self._offset += len(line)


class Segments:
    """The segments under one root."""

    root: str

    def __init__(self, root: str) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(root)
            self.root = root
        except (ImportError, ValueError) as error:
            raise ConfigError(f"artifacts: {root} cannot be used: {error}") from error

    def write(self, rollout_id: str, calls: bytes, rollout: bytes) -> None:
        """Keep one rollout: the lines of its calls, and its own line without a line end.

        Raises:
            StageError: the root did not take it.
        """
        self._put(self._path(rollout_id), gzip.compress(calls + rollout + b"\n", 6, mtime=0))

    def config(self, own: bytes) -> bytes:
        """What the root was first used with: `own`, if it is new.

        Raises:
            StageError: the root cannot be used.
        """
        path = f"{self._root}/config.json"
        try:
            if self._files.exists(path):
                return bytes(self._files.cat_file(path))
        except OSError as error:
            raise StageError(f"{path}: {error}") from error
        self._put(path, own)
        return own

    def names(self) -> list[str]:
        """The ids of all rollouts, sorted."""
        if not self._files.exists(self._root):
            return []
        self._files.invalidate_cache()
        found = (Path(path).name for path in self._files.ls(self._root, detail=False))
        return sorted(unquote(name[: -len(_SUFFIX)]) for name in found if name.endswith(_SUFFIX))

    def read(self, rollout_id: str) -> tuple[bytes, bytes]:
        """The lines of its calls, and its own line with a line end.

        Raises:
            StageError: not there, or damaged.
        """
        path = self._path(rollout_id)
        try:
            data = gzip.decompress(self._files.cat_file(path))
            split = data.rstrip(b"\n").rfind(b"\n") + 1
            from_json(Rollout, data[split:])
        except (OSError, EOFError, zlib.error, StageError) as error:
            raise StageError(f"{path}: the segment cannot be read: {error}") from error
        return data[:split], data[split:]

    def _put(self, path: str, data: bytes) -> None:
        partial = f"{path}.partial"
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(partial, data)
            self._files.mv(partial, path)
        except OSError as error:
            raise StageError(f"{path}: it could not be written: {error}") from error

    def _path(self, rollout_id: str) -> str:
        return f"{self._root}/{quote(rollout_id, safe='')}{_SUFFIX}"
