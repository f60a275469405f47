"""Removes images that nothing needs.

Needed is: what a process that may open sandboxes could use (it holds the store, and nothing is removed then);
each named image that a Dockerfile of a task starts from, in the folders one is told of; what a named image is
made of. What was built from a task's folder is built again when it is asked for, so it may go once it has not
been used for a while.
"""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from katcore.errors import TaskError
from katcore.sandbox.dockerfile import parse
from katcore.sandbox.image import BUILDING, ImageStore, read_image

_OWN = ("host-", "root-")
"""Layers that belong to no image: what is beneath all of them."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed."""

    names: tuple[str, ...]
    built: int
    layers: int
    leftovers: int


def prune(
    store: ImageStore, tasks: Iterable[Path], *, unused_days: float, names: bool = False
) -> Pruned:
    """Remove what was not used for `unused_days`; with `names`, also named images that no task needs.

    `tasks` are folders with tasks, however deep.

    Raises:
        ImageError: a process uses the store.
    """
    with store.alone() as root:
        until_s = time.time() - unused_days * 86400
        gone: list[Path] = []
        if names:
            needed = _parents(tasks)
            gone = [
                path
                for path in _old(root / "names", until_s)
                if not needed & {unquote(path.stem), unquote(path.stem).removesuffix(":latest")}
            ]
        built = _old(root / "built", until_s)
        for path in (*gone, *built):
            path.unlink()
        layers = _remove_layers(root)
        leftovers = [*root.glob(f"{BUILDING}*"), *root.glob("pulls/*")]
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
    return Pruned(
        tuple(sorted(unquote(path.stem) for path in gone)), len(built), layers, len(leftovers)
    )


def _old(folder: Path, until_s: float) -> list[Path]:
    return [path for path in folder.glob("*.json") if path.stat().st_mtime <= until_s]


def _parents(tasks: Iterable[Path]) -> set[str]:
    """What the Dockerfiles in some folders start FROM. One that cannot be read needs nothing."""
    found = set()
    for folder in tasks:
        for path in folder.rglob("Dockerfile"):
            try:
                found.add(parse(path).parent)
            except TaskError:
                continue
    return found


def _remove_layers(root: Path) -> int:
    used: set[str] = set()
    for folder in ("names", "built"):
        for path in (root / folder).glob("*.json"):
            used.update(read_image(path).layers)
    unused = [
        path
        for path in (root / "layers").iterdir()
        if path.name not in used and not path.name.startswith(_OWN)
    ]
    for path in unused:
        shutil.rmtree(path)
    return len(unused)
