"""The image store: each environment folder is built once per content, into read-only layers.

    <root>/layers/<key>/       files of one build, on top of the parent's layers
    <root>/built/<key>.json    what a build gave: its layers, ENV and WORKDIR
    <root>/names/<name>.json   the same, under a name that a Dockerfile can start FROM
    <root>/store.lock          held by whoever may use any of it; `prune` wants it alone

A build happens in a temporary folder and is renamed into place, under a file lock: a killed build leaves
nothing that is taken for finished, and two processes that want the same image build it once.
"""

import fcntl
import hashlib
import json
import os
import posixpath
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

from katcore.errors import ImageError, ImageMissingError, TaskError
from katcore.sandbox import history
from katcore.sandbox.dockerfile import Dockerfile, Step, parse
from katcore.sandbox.unpack import unpack_changes

HOST = "host"
"""The parent of all images: the machine's own programs, read-only."""
BUILDING = "building-"
"""How the name of a folder begins in which something is being built; the builder's mark comes next."""


@dataclass(frozen=True, slots=True)
class Image:
    """A root file system: layers (topmost first), variables and working folder.

    With `is_whole` it brings its own programs, as one that was imported; without, it has the machine's.
    """

    key: str
    layers: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    is_whole: bool = False


Runner = Callable[[Image, str], bytes]
"""Runs a shell command in a fresh sandbox of an image; returns its changes as a tar archive."""


class ImageStore:
    """Builds, caches and names images under one folder. `mark` is in the names of unfinished builds."""

    def __init__(self, root: Path, mark: str = "") -> None:
        self._root = root
        self._mark = mark
        self._known: dict[tuple[Path, bool], tuple[int, Image]] = {}
        for folder in ("layers", "built", "names"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self._lock_file = (root / "store.lock").open("w")
        fcntl.flock(self._lock_file, fcntl.LOCK_SH)

    @contextmanager
    def alone(self) -> Iterator[Path]:
        """Its folder, while nobody else uses the store.

        Raises:
            ImageError: somebody does.
        """
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ImageError(
                f"{self._root} is in use by a process that may open sandboxes; ask again when it is done"
            ) from error
        try:
            yield self._root
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_SH)

    def names(self) -> tuple[str, ...]:
        """The named images, and `host`."""
        paths = (self._root / "names").glob("*.json")
        return (HOST, *sorted(unquote(path.stem) for path in paths))

    def named(self, name: str) -> Image | None:
        """The image of a name; None if there is none, or its files are gone."""
        for candidate in (name, f"{name}:latest"):
            path = self._name(candidate)
            if path.exists() and self._is_there(image := read_image(path)):
                return image
        return None

    def snapshot(self, image: Image, key: str, changes: bytes) -> Image:
        """An image and what was changed in a sandbox of it; `drop` removes it."""
        with self._building() as folder:
            top = folder / "layer"
            unpack_changes(changes, top)
            layer = self._keep(top, key)
        return replace(image, key=key, layers=(layer, *image.layers))

    def drop(self, snapshot: Image) -> None:
        """Remove the layer of a snapshot."""
        shutil.rmtree(self.folders(snapshot)[0], ignore_errors=True)

    def add(self, name: str, image: Image, write: Callable[[Path], None]) -> None:
        """Give a name to an image whose one layer `write` fills, unless it is there already."""
        (layer,) = image.layers
        with self._lock(layer):
            if not (self._root / "layers" / layer).exists():
                with self._building() as folder:
                    top = folder / "layer"
                    top.mkdir(mode=0o755)
                    write(top)
                    self._keep(top, layer)
        _write_json(self._name(name), image)

    def folders(self, image: Image) -> tuple[Path, ...]:
        """Where the layers of an image are, topmost first."""
        return tuple(self._root / "layers" / layer for layer in image.layers)

    def build(self, name: str, environment: Path, *, run: Runner | None = None) -> Image:
        """Build an environment folder and give it a name for others to start FROM.

        Raises:
            TaskError: the Dockerfile is outside the subset.
            ImageMissingError: its parent is not known.
        """
        image = self.image(environment, run=run)
        _write_json(self._name(name), image)
        return image

    def image(
        self, environment: Path, *, run: Runner | None = None, keeps_history: bool = False
    ) -> Image:
        """The image of an environment folder; built now if its content is new.

        Its repositories know nothing beyond their HEAD, unless it `keeps_history`.

        Raises:
            TaskError, ImageMissingError: as `build`; or something is to be run in it, and there is no `run`.
        """
        stamp = (environment / "Dockerfile").stat().st_mtime_ns if environment.is_dir() else 0
        known = self._known.get((environment, keeps_history))
        if known and known[0] == stamp:
            return known[1]
        dockerfile = parse(environment / "Dockerfile")
        parent = self._parent(dockerfile, environment)
        afterwards = "" if keeps_history else history.SCRIPT
        key = content_key(environment, f"{parent.key}\0{afterwards}")
        path = self._root / "built" / f"{key}.json"
        if not self._is_built(path):
            with self._lock(key):
                if not self._is_built(path):
                    image = self._build(key, parent, dockerfile, environment, run)
                    if not keeps_history:
                        image = self._cut(image, parent, environment, run)
                    _write_json(path, image)
        found = read_image(path)
        os.utime(path)
        self._known[environment, keeps_history] = (stamp, found)
        return found

    def _parent(self, dockerfile: Dockerfile, environment: Path) -> Image:
        if dockerfile.parent == HOST:
            return Image(HOST)
        image = self.named(dockerfile.parent)
        if image is None:
            raise ImageMissingError(
                f"{environment}/Dockerfile: no image named {dockerfile.parent!r};"
                f" known: {', '.join(self.names())}; `kat images` imports and pulls"
            )
        return image

    def _name(self, name: str) -> Path:
        return self._root / "names" / f"{quote(name, safe='')}.json"

    def _is_there(self, image: Image) -> bool:
        return all(folder.is_dir() for folder in self.folders(image))

    def _is_built(self, path: Path) -> bool:
        return path.exists() and self._is_there(read_image(path))

    def _build(
        self,
        key: str,
        parent: Image,
        dockerfile: Dockerfile,
        environment: Path,
        run: Runner | None,
    ) -> Image:
        workdir, env, layers = parent.workdir, dict(parent.env), parent.layers
        with self._building() as folder:
            top = folder / "layer"
            top.mkdir(mode=0o755)
            for step in dockerfile.steps:
                if step.verb == "WORKDIR":
                    workdir = posixpath.join(workdir, step.arguments[0])
                    folder_inside = _inside(top, workdir)
                    _refuse_link(top, folder_inside, step)
                    folder_inside.mkdir(parents=True, exist_ok=True)
                elif step.verb == "ENV":
                    env |= dict(word.split("=", 1) for word in step.arguments)
                elif step.verb == "COPY":
                    _copy(step, environment, top, workdir)
                else:
                    if run is None:
                        raise TaskError(
                            f"{environment}/Dockerfile:{step.line}: RUN needs a sandbox backend;"
                            " build this image through one"
                        )
                    layers = (self._keep(top, f"{key[:24]}-{step.line}"), *layers)
                    top = folder / f"layer-{step.line}"
                    so_far = Image(key, layers, env, workdir, parent.is_whole)
                    unpack_changes(run(so_far, step.arguments[0]), top)
            layers = (self._keep(top, key), *layers)
        return Image(key, layers, env, workdir, parent.is_whole)

    def _cut(self, image: Image, parent: Image, environment: Path, run: Runner | None) -> Image:
        """The image without what its repositories know beyond their HEAD: a layer above, if there are any."""
        is_imported = parent.is_whole and len(parent.layers) == 1
        num_cut = 0 if is_imported else len(parent.layers)
        new = self.folders(image)[: len(image.layers) - num_cut]
        if not any(map(history.has_repository, new)):
            return image
        if run is None:
            raise TaskError(
                f"{environment}: it has a git repository, whose later history has to be taken out in"
                " a sandbox; build this image through a backend"
            )
        with self._building() as folder:
            top = folder / "layer"
            unpack_changes(run(image, f"exec bash -c {shlex.quote(history.SCRIPT)}"), top)
            return replace(
                image, layers=(self._keep(top, f"{image.key[:24]}-history"), *image.layers)
            )

    @contextmanager
    def _building(self) -> Iterator[Path]:
        """A folder for what is not finished, which a sweep finds by its name."""
        prefix = f"{BUILDING}{self._mark}-"
        with tempfile.TemporaryDirectory(dir=self._root, prefix=prefix) as folder:
            yield Path(folder)

    def _keep(self, folder: Path, key: str) -> str:
        target = self._root / "layers" / key
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
        return key

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        path = self._root / "built" / f".{key[:2]}.lock"
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def content_key(environment: Path, start: str) -> str:
    """The hash of all files of an environment folder, and of what its image starts from."""
    digest = hashlib.sha256(start.encode())
    for path in sorted(environment.rglob("*")):
        name = str(path.relative_to(environment))
        mode = path.lstat().st_mode
        digest.update(f"\0{name}\0{mode:o}\0".encode())
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:40]


def _inside(top: Path, path: str) -> Path:
    return top / posixpath.normpath(posixpath.join("/", path)).lstrip("/")


def _refuse_link(top: Path, path: Path, step: Step) -> None:
    """What is written through a link would land in the machine's own files."""
    for part in (path, *path.parents):
        if part == top:
            return
        if part.is_symlink():
            link = f"/{part.relative_to(top)}"
            raise TaskError(f"Dockerfile:{step.line}: {step.verb} leads through the link {link}")


def _copy(step: Step, environment: Path, top: Path, workdir: str) -> None:
    *sources, destination = step.arguments
    target = _inside(top, posixpath.join(workdir, destination))
    into_folder = destination.endswith("/") or destination in {".", ".."} or len(sources) > 1
    for source in sources:
        path = environment / source
        if not path.resolve().is_relative_to(environment.resolve()) or not path.exists():
            raise TaskError(f"{environment}/Dockerfile:{step.line}: COPY: no {source!r} here")
        if path.is_dir():
            for item in (path, *path.rglob("*")):
                _refuse_link(top, target / item.relative_to(path), step)
            shutil.copytree(path, target, symlinks=True, dirs_exist_ok=True)
            continue
        file = target / path.name if into_folder or target.is_dir() else target
        _refuse_link(top, file, step)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, file, follow_symlinks=False)


def read_image(path: Path) -> Image:
    """The image that a file of `built/` or `names/` says."""
    content = json.loads(path.read_bytes())
    return Image(**{**content, "layers": tuple(content["layers"])})


def _write_json(path: Path, image: Image) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(image)))
    temporary.replace(path)
