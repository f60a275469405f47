"""What was changed in a container, found by looking at all of its files before and after.

No cluster says what differs from an image. A file counts as changed if its mode, size or one of its times is
not as it was; the time of the last change of its inode cannot be set. Standard library only: it runs in the
container.
"""

import hashlib
import io
import marshal
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator

from kat_sandboxes.zygote import files

_SKIPPED = frozenset({"tmp", "proc", "dev", "run", "sys", ".kat"})


class Tree:
    """All files of this root as they are now, but for what no archive of changes holds.

    Of each file 8 bytes and its name are kept, compressed: the memory is the sandbox's own.
    """

    def __init__(self) -> None:
        self._fixed = frozenset(_read_only())
        self._before = zlib.compress(marshal.dumps(dict(self._signatures("", set()))), 1)

    def changes(self) -> bytes:
        """An archive of what is different now (see `files`)."""
        before: dict[str, bytes] = marshal.loads(zlib.decompress(self._before))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            missing = set(before)
            for path, signature in self._signatures("", missing):
                if before.get(path) != signature:
                    files.add(tar, path, is_deleted=False)
            for path in sorted(missing):
                if os.path.dirname(path) not in missing and _is_folder(os.path.dirname(path)):
                    files.add(tar, path, is_deleted=True)
        return buffer.getvalue()

    def _signatures(self, folder: str, missing: set[str]) -> Iterator[tuple[str, bytes]]:
        """Each path beneath a folder, parents first, with what shows a change; `missing` loses them all."""
        for name in sorted(os.listdir(f"/{folder}")):
            path = os.path.join(folder, name)
            if path in _SKIPPED or path in self._fixed:
                missing.discard(path)
                continue
            found = os.lstat(f"/{path}")
            missing.discard(path)
            is_folder = stat.S_ISDIR(found.st_mode)
            seen = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            text = repr((found.st_mode, found.st_uid, found.st_gid, () if is_folder else seen))
            yield path, hashlib.blake2b(text.encode(), digest_size=8).digest()
            if is_folder:
                with files.unlocked(f"/{path}"):
                    yield from self._signatures(path, missing)


def _read_only() -> Iterator[str]:
    """What is mounted read-only beneath the root: it cannot change, and may be large."""
    with open("/proc/self/mountinfo") as file:
        for line in file:
            words = line.split(" ")
            if "ro" in words[5].split(","):
                yield words[4][1:]


def _is_folder(path: str) -> bool:
    return os.path.isdir(f"/{path}") and not os.path.islink(f"/{path}")
