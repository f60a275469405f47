"""Unpacks the layers of an image, one on top of the other, into one folder.

Whatever an archive says, nothing is written outside the folder: links are followed as the image would see
them, with the folder as its root. Everything is owned by who unpacks, since a sandbox has one user. Devices
are refused, set-user-id bits dropped. What a layer deletes (`.wh.NAME`, `.wh..wh..opq`) is deleted.

Format: https://github.com/opencontainers/image-spec/blob/main/layer.md.
"""

import contextlib
import io
import os
import posixpath
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from katcore.errors import ImageError

_DELETED = "KATCORE.deleted"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_MOST_LINKS = 40
_KEPT_MODE = 0o1777


def unpack_layer(archive: IO[bytes], root: Path) -> None:
    """Apply one layer, a tar archive.

    Raises:
        ImageError: it is no archive, is cut off, or holds what no image may.
    """
    written: set[str] = set()
    with _opened(archive, root) as (tar, members):
        for member in members:
            _apply(tar, member, root, written)


def unpack_changes(archive: bytes, root: Path) -> None:
    """Make a new folder of what was changed in a sandbox: a layer, in which what was deleted hides.

    Raises:
        ImageError: it is no archive, is cut off, or holds what no sandbox can have changed.
    """
    root.mkdir(mode=0o755)
    with _opened(io.BytesIO(archive), root) as (tar, members):
        for member in members:
            path = resolve(root, member.name)
            if path == root or member.issparse():
                raise ImageError(f"{member.name}: no sandbox says so of its changes")
            if member.pax_headers.get(_DELETED):
                _make_folder(path.parent, root)
                os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
            else:
                _write(tar, member, path, root)


@contextlib.contextmanager
def _opened(
    archive: IO[bytes], root: Path
) -> Iterator[tuple[tarfile.TarFile, Iterator[tarfile.TarInfo]]]:
    """An archive and its members; in the end folders get their times. A broken one is an ImageError."""
    times: list[tuple[Path, float]] = []

    def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for member in tar:
            yield member
            if member.isdir():
                times.append((resolve(root, member.name), member.mtime))

    try:
        with tarfile.open(fileobj=archive, mode="r|") as tar:
            yield tar, members(tar)
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise ImageError(f"a layer is no tar archive, or is cut off: {error}") from error
    for folder, time_s in reversed(times):
        if folder.is_dir() and not folder.is_symlink():
            os.utime(folder, (time_s, time_s))


def resolve(root: Path, name: str) -> Path:
    """Where the image's path `name` is below `root`; its last part is not followed if it is a link.

    Raises:
        ImageError: links lead in a circle.
    """
    left = [part for part in name.split("/") if part not in {"", "."}][::-1]
    done: list[str] = []
    num_links = 0
    while left:
        part = left.pop()
        if part == "..":
            done = done[:-1]
            continue
        path = root.joinpath(*done, part)
        if left and path.is_symlink():
            num_links += 1
            if num_links > _MOST_LINKS:
                raise ImageError(f"{name}: its links lead in a circle")
            target = os.readlink(path)
            if target.startswith("/"):
                done = []
            left += [part for part in target.split("/") if part not in {"", "."}][::-1]
        else:
            done.append(part)
    return root.joinpath(*done)


def _apply(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path, written: set[str]) -> None:
    if "\0" in member.name:
        raise ImageError(f"{member.name!r} is no path")
    folder, name = posixpath.split(posixpath.normpath("/" + member.name))
    if name == _OPAQUE:
        _empty(resolve(root, folder + "/."), root, written)
    elif name.startswith(_WHITEOUT):
        hidden = name.removeprefix(_WHITEOUT)
        if hidden in {"", ".", ".."}:
            raise ImageError(f"{member.name} deletes no file")
        path = resolve(root, posixpath.join(folder, hidden))
        if str(path) not in written:
            _remove(path)
    elif name:
        path = resolve(root, posixpath.join(folder, name))
        if path == root:
            raise ImageError(f"{member.name} leads out of the image")
        _write(tar, member, path, root)
        while path != root and str(path) not in written:
            written.add(str(path))
            path = path.parent


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, root: Path) -> None:
    _make_folder(path.parent, root)
    mode = member.mode & _KEPT_MODE
    if member.isdir():
        if path.is_symlink() or not path.is_dir():
            _remove(path)
            path.mkdir()
        path.chmod(mode | stat.S_IRWXU)
        return
    if member.islnk():
        target = resolve(root, member.linkname)
        if target == path:
            return
        if target.is_symlink() or not target.is_file():
            raise ImageError(f"{member.name} is a link to {member.linkname}, which is no file")
        _remove(path)
        os.link(target, path)
        return
    if member.issym() and not member.linkname:
        raise ImageError(f"{member.name} is a link to nothing")
    _remove(path)
    if member.issym():
        path.symlink_to(member.linkname)
    elif member.isfifo():
        os.mkfifo(path, mode)
    elif member.isreg():
        source = tar.extractfile(member)
        assert source
        with path.open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        path.chmod(mode | stat.S_IRUSR)
        os.utime(path, (member.mtime, member.mtime))
    else:
        raise ImageError(f"{member.name} is a device, which no image may bring along")


def _make_folder(folder: Path, root: Path) -> None:
    """Make the folders on the way; a file that is in the way is replaced."""
    for path in (*reversed(folder.relative_to(root).parents), folder.relative_to(root)):
        full = root / path
        if full != root and (full.is_symlink() or not full.is_dir()):
            _remove(full)
            full.mkdir()


def _empty(folder: Path, root: Path, written: set[str]) -> None:
    """Remove what earlier layers put into a folder, but not what this one did."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if str(path) not in written:
            _remove(path)
        elif path.is_dir() and not path.is_symlink():
            _empty(path, root, written)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
