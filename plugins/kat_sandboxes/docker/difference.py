"""What was changed in a container, from the engine's list of changed paths and what that cannot see.

The engine compares the container's own file system with its image. It does not look into what is mounted
there: volumes that the image declares, and the files of /etc that it makes itself. Those are compared with
how they were at the start. Standard library only: it runs in the container.
"""

import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kat_sandboxes.zygote import files

_SKIPPED = frozenset({"tmp", "proc", "dev", "run", "sys", ".kat"})
_DELETED = 2
"""`Kind` of a deleted path: ContainerChanges in Docker's API."""
_UNSAID = re.compile("\ufffd+")

Change = tuple[str, bool]
"""A path relative to the root, and whether it is deleted."""
Signature = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Watched:
    """All mount points of the container, the folders that they are in, and what was beneath writable ones."""

    points: frozenset[str]
    folders: dict[str, Signature]
    before: dict[str, Signature]

    @classmethod
    def now(cls) -> "Watched":
        """As it is at this moment."""
        points: set[str] = set()
        before: dict[str, Signature] = {}
        with open("/proc/self/mountinfo") as file:
            for line in file:
                words = line.split(" ")
                path = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), words[4])[1:]
                points.add(path)
                is_own = os.access(f"/{path}", os.R_OK)  # the grader's folders are not
                if path and path.split("/")[0] not in _SKIPPED and is_own and _is_writable(words):
                    before |= dict(_beneath(path))
        folders = {os.path.dirname(path) for path in points}
        return cls(frozenset(points), {path: _signature(path) for path in folders}, before)

    def changed(self) -> Iterator[Change]:
        """What is not as it was beneath writable mounts."""
        missing = set(self.before)
        for top in sorted(missing & self.points):
            for path, signature in _beneath(top):
                missing.discard(path)
                if self.before.get(path) != signature:
                    yield path, False
        yield from ((path, True) for path in sorted(missing) if _is_folder(os.path.dirname(path)))


def _is_writable(words: list[str]) -> bool:
    """Of a line of mountinfo: proc(5)."""
    return "rw" in words[5].split(",")


@dataclass(slots=True)
class _Listed:
    """A path in the engine's list, and those beneath it."""

    is_deleted: bool = False
    inner: dict[str, "_Listed"] = field(default_factory=dict)


def archive(listed: bytes, watched: Watched) -> bytes:
    """The changes as an archive (see `files`). `listed` is the engine's list, as JSON.

    Raises:
        ValueError: a path was deleted whose name the engine cannot say.
    """
    top = _Listed()
    for item in json.loads(listed):
        _put(top, item)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for changes in (_changed(top, "", watched), watched.changed()):
            for path, is_deleted in changes:
                files.add(tar, path, is_deleted=is_deleted)
    return buffer.getvalue()


def _put(top: _Listed, item: dict[str, Any]) -> None:
    node = top
    for name in item["Path"].strip("/").split("/"):
        node = node.inner.setdefault(name, _Listed())
    node.is_deleted = item["Kind"] == _DELETED


def _changed(node: _Listed, folder: str, watched: Watched) -> Iterator[Change]:
    """What is listed beneath a folder, parents first. Beneath what is no folder any more, nothing is.

    Folders are listed, too, in which the engine has made a mount point; as they were then, they are left out.
    """
    for said, listed in sorted(node.inner.items()):
        for name in _names(said, folder, listed):
            path = os.path.join(folder, name)
            if path in _SKIPPED or path in watched.points:
                continue
            is_there = os.path.lexists(f"/{path}")
            if listed.is_deleted or not is_there:
                yield path, True
            if is_there and listed.is_deleted:  # replaced, with all that was beneath it
                yield from ((inner, False) for inner, _ in _beneath(path))
            elif is_there:
                if watched.folders.get(path) != _signature(path):
                    yield path, False
                if listed.inner and _is_folder(path):
                    with files.unlocked(f"/{path}"):
                        yield from _changed(listed, path, watched)


def _names(said: str, folder: str, listed: _Listed) -> list[str]:
    """The names that the engine may mean: its JSON has marks for what is no UTF-8."""
    if "\ufffd" not in said:
        return [said]
    wanted = _UNSAID.sub("\ufffd", said)
    found = [name for name in os.listdir(f"/{folder}") if _said(name) == wanted]
    if listed.is_deleted or not found:
        raise ValueError(f"/{folder}/{said} was deleted, and its name, no UTF-8, cannot be known")
    return found


def _said(name: str) -> str:
    return _UNSAID.sub("\ufffd", os.fsencode(name).decode(errors="replace"))


def _is_folder(path: str) -> bool:
    return os.path.isdir(f"/{path}") and not os.path.islink(f"/{path}")


def _beneath(top: str) -> Iterator[tuple[str, Signature]]:
    """A path and all beneath it, parents first."""
    signature = _signature(top)
    if not stat.S_ISDIR(signature[0]):
        yield top, signature
        return
    yield top, signature[:1]
    with files.unlocked(f"/{top}"):
        for name in sorted(os.listdir(f"/{top}")):
            yield from _beneath(os.path.join(top, name))


def _signature(path: str) -> Signature:
    found = os.lstat(f"/{path}")
    return (found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
