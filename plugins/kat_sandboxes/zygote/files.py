"""What was changed inside a sandbox, as a tar archive; and making the same changes elsewhere."""

import contextlib
import errno
import io
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator

DELETED = "KATCORE.deleted"
"""The pax header of an entry that stands for a path that is no longer there."""

_SKIPPED = frozenset({"tmp", "proc", "dev", "run"})


class Root:
    """The writable (upper) and read-only (lower) folders beneath a sandbox's root."""

    def __init__(self, upper: int, lowers: list[int]) -> None:
        self._upper = upper
        self._lowers = lowers

    def close(self) -> None:
        """For a child that is about to run foreign code."""
        for descriptor in (self._upper, *self._lowers):
            os.close(descriptor)

    def changes(self) -> bytes:
        """An archive of all changed and deleted paths outside /tmp, /run, /proc and /dev."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path, is_deleted in self._changed(""):
                add(tar, path, is_deleted=is_deleted)
        return buffer.getvalue()

    def _changed(self, folder: str) -> Iterator[tuple[str, bool]]:
        present = set(os.listdir(f"/{folder}"))
        for name in sorted(self._beneath(folder) - present):
            yield os.path.join(folder, name), True
        for name in sorted(self._list(self._upper, folder)):
            path = os.path.join(folder, name)
            if name not in present or path in _SKIPPED:
                continue
            yield path, False
            mode = os.stat(path, dir_fd=self._upper, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                with unlocked(f"/{path}"):
                    yield from self._changed(path)

    def _beneath(self, folder: str) -> set[str]:
        return {name for lower in self._lowers for name in self._list(lower, folder)}

    @staticmethod
    def _list(root: int, folder: str) -> list[str]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            descriptor = os.open(folder or ".", flags, dir_fd=root)
        except OSError:
            return []
        try:
            return os.listdir(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def unlocked(path: str) -> Iterator[None]:
    """Give the owner access meanwhile: without capabilities root too is held to the mode."""
    mode = os.lstat(path).st_mode
    needed = 0o700 if stat.S_ISDIR(mode) else 0o400 if stat.S_ISREG(mode) else 0
    is_locked = mode & needed != needed
    if is_locked:
        os.chmod(path, stat.S_IMODE(mode) | needed)
    try:
        yield
    finally:
        if is_locked:
            os.chmod(path, stat.S_IMODE(mode))


def add(tar: tarfile.TarFile, path: str, *, is_deleted: bool) -> None:
    """Put one changed path, relative to the root, into an archive. If it is gone by now, it is left out."""
    if is_deleted:
        entry = tarfile.TarInfo(path)
        entry.pax_headers = {DELETED: "1"}
        tar.addfile(entry)
        return
    with contextlib.suppress(FileNotFoundError):
        _add_there(tar, path)


def _add_there(tar: tarfile.TarFile, path: str) -> None:
    entry: tarfile.TarInfo | None = tar.gettarinfo(f"/{path}", path)
    if entry is None:  # a socket, which no archive can hold
        return
    if entry.isreg():
        with unlocked(f"/{path}"), open(f"/{path}", "rb") as file:
            tar.addfile(entry, file)
    else:
        tar.addfile(entry)


def apply(archive: bytes) -> None:
    """Make the changes of an archive to this root."""
    folders: list[tarfile.TarInfo] = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = f"/{member.name}"
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            if not (member.isdir() and is_folder):
                if is_folder:
                    shutil.rmtree(path)
                else:
                    _unlink(path)
            if DELETED not in member.pax_headers:
                tar.extract(member, "/", set_attrs=not member.isdir(), filter="fully_trusted")
            # A folder of somebody else's is listed for what is in it: nobody here can have changed itself.
            if member.isdir() and os.lstat(path).st_uid == os.geteuid():
                os.chmod(path, 0o700)
                folders.append(member)
        for member in reversed(folders):
            tar.chmod(member, f"/{member.name}")
            tar.utime(member, f"/{member.name}")


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # A file that is mounted by itself, as containers have in /etc: extracting writes into it.
