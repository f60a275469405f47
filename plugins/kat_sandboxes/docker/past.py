"""Images of an engine whose git repositories know nothing beyond HEAD: see `katcore.sandbox.history`."""

import io
import posixpath
import secrets
import tarfile
from collections import defaultdict
from collections.abc import Iterable

from kat_sandboxes.docker.engine import MARK, Engine, binds, not_built
from katcore.errors import TaskError
from katcore.sandbox import history


def cut(engine: Engine, tag: str, new: str, mounts: dict[str, str], mark: str) -> None:
    """Give the name `new` to an image without that knowledge. Blocks.

    All of the image is read, to find repositories whatever programs are in it. Where there is one, bash and
    git in the image take out what is later. `mounts` are folders of the machine by where they are shown.

    Raises:
        TaskError: it has a repository and no bash or git; or one that cannot be read, or is in a volume.
    """
    name = f"{mark}-history-{secrets.token_hex(4)}"
    config = engine.image(tag) or {}
    settings = {
        "Image": tag,
        "User": "0",
        "Entrypoint": ["bash", "-c", history.SCRIPT],
        "NetworkDisabled": True,
        "Healthcheck": {"Test": ["NONE"]} if config.get("Healthcheck") else None,
        "HostConfig": {
            "NetworkMode": "none",
            "SecurityOpt": ["no-new-privileges"],
            "LogConfig": {"Type": "json-file"},
            "Mounts": binds(mounts),
        },
    }
    engine.create(name, {MARK: mark}, settings)
    try:
        found = repositories(engine.export(name))
        if not found:
            engine.tag(tag, new)
            return
        _refuse_volumes(found, config.get("Volumes") or ())
        code, said = engine.finish(name)
        if code:
            raise not_built(
                f"{found[0]}: what this git repository knows beyond its HEAD cannot be taken out (exit code"
                f" {code}). It takes bash and git in the image; or the task has to say keep_git_history",
                said,
            )
        engine.commit(name, new, config)
    finally:
        engine.remove(name)


def repositories(chunks: Iterable[bytes]) -> list[str]:
    """The folders with a git repository, or a part of one, in a tar archive of a root file system."""
    folders: defaultdict[str, set[str]] = defaultdict(set)
    files: defaultdict[str, set[str]] = defaultdict(set)
    with tarfile.open(fileobj=io.BufferedReader(_Chunks(chunks), 1 << 20), mode="r|") as tar:
        for member in tar:
            parent, name = posixpath.split(posixpath.normpath(f"/{member.name}"))
            (folders if member.isdir() else files)[parent].add(name)
    parents = sorted({*folders, *files})
    return [path for path in parents if history.is_repository(folders[path], files[path])]


def _refuse_volumes(found: list[str], volumes: Iterable[str]) -> None:
    for path in found:
        for volume in volumes:
            if f"{path}/".startswith(f"{volume.rstrip('/')}/"):
                raise TaskError(
                    f"{path}: a git repository in the volume {volume}, of which its image cannot be rid:"
                    " leave out VOLUME, or let the task say keep_git_history"
                )


class _Chunks(io.RawIOBase):
    """A file of what comes in pieces."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Some bytes; 0 at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        num = min(len(buffer), len(self._rest))
        buffer[:num] = self._rest[:num]
        self._rest = self._rest[num:]
        return num
