"""Images as others store them: OCI layouts, what `docker save` writes, and plain root file systems.

A folder or an archive of one. Of an image for several machines, the one for this machine is taken. All that
has a digest is held to it.

Formats: https://github.com/opencontainers/image-spec; `docker save` before version 25 has no index, and its
configuration gives the digests of its layers.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import platform
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

from backports import zstd

from katcore.errors import ImageError
from katcore.sandbox.unpack import unpack_layer

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
MOST_BYTES = 4 << 20
"""Of a manifest, index or configuration."""
_BLOCK = 1 << 20
_MOUNTED = ("dev", "proc", "opt", "opt/scaffold")
_COMPRESSIONS: tuple[tuple[bytes, Callable[[Any], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x28\xb5\x2f\xfd", zstd.open),
)


class Files(Protocol):
    """The files of a layout, in a folder or in an archive."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def open(self, name: str) -> IO[bytes]:
        """To read it from its beginning."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's file, its digest as stored, and that of the archive without compression, where known."""

    name: str
    digest: str = ""
    content_digest: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an image is: its key, its layers from the lowest up, and how its commands are run."""

    digest: str
    layers: tuple[Layer, ...]
    names: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """A layout as a folder."""

    root: Path

    def has(self, name: str) -> bool:
        """See `Files`."""
        return (self.root / name).is_file()

    def open(self, name: str) -> IO[bytes]:
        """See `Files`."""
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ImageError(f"{name} leads out of {self.root}")
        return path.open("rb")


@dataclass(frozen=True, slots=True)
class TarFiles:
    """A layout as an archive."""

    tar: tarfile.TarFile

    def has(self, name: str) -> bool:
        """See `Files`."""
        return self._find(name) is not None

    def open(self, name: str) -> IO[bytes]:
        """See `Files`."""
        member = self._find(name)
        file = self.tar.extractfile(member) if member else None
        if file is None:
            raise ImageError(f"there is no file {name} in the archive")
        return file

    def _find(self, name: str) -> tarfile.TarInfo | None:
        for candidate in (name, f"./{name}"):
            try:
                return self.tar.getmember(candidate)
            except KeyError:
                continue
        return None


@contextmanager
def opened(path: Path) -> Iterator[tuple[Files, Manifest]]:
    """The image at `path`, whatever form it has.

    Raises:
        ImageError: it is none that can be read; says why.
    """
    with ExitStack() as held:
        try:
            files, manifest = _open(path, held)
        except (OSError, tarfile.TarError, EOFError) as error:
            raise ImageError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ImageError(f"{path}: not an image as the format has it: {error!r}") from error
        yield files, manifest


def _open(path: Path, held: ExitStack) -> tuple[Files, Manifest]:
    files: Files = FolderFiles(path)
    if not path.is_dir():
        files = TarFiles(held.enter_context(tarfile.open(path)))  # noqa: SIM115 - `held` closes it
    if files.has("index.json"):
        return files, _of_index(files, _json(files, "index.json"))
    if files.has("manifest.json"):
        return files, _of_docker(files, _json(files, "manifest.json"))
    if path.is_dir():
        raise ImageError(f"{path}: no index.json: not an OCI layout")
    path = path.resolve()
    return FolderFiles(path.parent), _plain(path)


def unpack(files: Files, manifest: Manifest, root: Path) -> None:
    """Unpack all layers into an empty folder, and check their digests.

    Raises:
        ImageError: a layer is not what its digest says, or holds what no image may.
    """
    for layer in manifest.layers:
        with files.open(layer.name) as file:
            _check(file, layer.digest, layer.name)
        if layer.content_digest:
            _check_content(files, layer)
        with files.open(layer.name) as file:
            unpack_layer(_uncompressed(file), root)
    for name in _MOUNTED:
        if (root / name).is_symlink():
            raise ImageError(f"/{name} of the image is a link; a sandbox mounts its own there")


def _plain(path: Path) -> Manifest:
    with path.open("rb") as file:
        digest = f"sha256:{_sha256(file)}"
    return Manifest(digest, (Layer(path.name, digest),))


def _of_index(files: Files, index: dict[str, Any]) -> Manifest:
    names: list[str] = []
    while True:
        descriptor = for_this_machine(index["manifests"])
        notes = descriptor.get("annotations") or {}
        names += [
            notes[key]
            for key in ("io.containerd.image.name", "org.opencontainers.image.ref.name")
            if key in notes
        ]
        content = _json(files, blob_name(descriptor["digest"]), descriptor["digest"])
        if "manifests" not in content:
            break
        index = content
    config = _json(files, blob_name(content["config"]["digest"]), content["config"]["digest"])
    contents = config.get("rootfs", {}).get("diff_ids", [])
    if len(contents) != len(content["layers"]):
        raise ImageError(f"{len(content['layers'])} layers, and digests of {len(contents)}")
    layers = tuple(
        Layer(blob_name(item["digest"]), item["digest"], inside)
        for item, inside in zip(content["layers"], contents, strict=True)
    )
    return Manifest(descriptor["digest"], layers, tuple(names), *_settings(config))


def _of_docker(files: Files, images: list[dict[str, Any]]) -> Manifest:
    if len(images) != 1:
        raise ImageError(f"{len(images)} images in one archive; save one at a time")
    image = images[0]
    with files.open(image["Config"]) as file:
        data = file.read(MOST_BYTES)
    config = json.loads(data)
    layers = tuple(
        Layer(name, content_digest=inside)
        for name, inside in zip(image["Layers"], config["rootfs"]["diff_ids"], strict=True)
    )
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Manifest(digest, layers, tuple(image.get("RepoTags") or ()), *_settings(config))


def for_this_machine(descriptors: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the manifests in an index, the one for this machine.

    Raises:
        ImageError: there is none.
    """
    wanted = ("linux", _MACHINES.get(platform.machine(), platform.machine()))
    platforms = [item.get("platform") or {} for item in descriptors]
    found = [(item.get("os"), item.get("architecture")) for item in platforms]
    for descriptor, has in zip(descriptors, found, strict=True):
        if has == wanted or (len(descriptors) == 1 and has == (None, None)):
            return descriptor
    what = ", ".join(f"{system}/{machine}" for system, machine in found) or "none"
    raise ImageError(f"no image for {'/'.join(wanted)}; there is: {what}")


def _settings(config: dict[str, Any]) -> tuple[dict[str, str], str]:
    own = config.get("config") or {}
    pairs = (item.partition("=") for item in own.get("Env") or ())
    return {name: value for name, _, value in pairs}, own.get("WorkingDir") or "/"


def blob_name(digest: str) -> str:
    """Where a layout has what has this digest.

    Raises:
        ImageError: it is not a SHA-256 digest.
    """
    kind, _, value = digest.partition(":")
    if kind != "sha256" or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ImageError(f"{digest!r} is no digest; sha256 is known here")
    return f"blobs/sha256/{value}"


def _json(files: Files, name: str, digest: str = "") -> Any:
    with files.open(name) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ImageError(f"{name} is larger than {MOST_BYTES >> 20} MiB")
    if digest and hashlib.sha256(data).hexdigest() != digest.removeprefix("sha256:"):
        raise ImageError(f"{name} is not what its digest says")
    return json.loads(data)


def _check(file: IO[bytes], digest: str, name: str) -> None:
    if digest and f"sha256:{_sha256(file)}" != digest:
        raise ImageError(f"{name} is not what its digest says: it was changed, or is cut off")


def _check_content(files: Files, layer: Layer) -> None:
    with files.open(layer.name) as file:
        try:
            _check(_uncompressed(file), layer.content_digest, layer.name)
        except (EOFError, OSError, lzma.LZMAError, zlib.error, zstd.ZstdError) as error:
            raise ImageError(f"{layer.name} is cut off: {error}") from error


def _uncompressed(file: IO[bytes]) -> IO[bytes]:
    head = file.read(6)
    file.seek(0)
    for magic, opener in _COMPRESSIONS:
        if head.startswith(magic):
            return cast(IO[bytes], opener(file))
    return file


def _sha256(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
