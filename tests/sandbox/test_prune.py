"""Pruning: what nothing needs goes, and nothing else."""

import os
import time
from pathlib import Path

import pytest

from katcore.errors import ImageError
from katcore.sandbox.image import ImageStore
from katcore.sandbox.imported import import_image
from katcore.sandbox.prune import Pruned, prune
from tests.sandbox.images import layer, write_layout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = ImageStore(tmp_path / "images")
    for name in ("used", "unused"):
        folder = write_layout(tmp_path / name, [layer((name, b"x"))])
        import_image(store, folder, name)
    for number, parent in enumerate(("used", "host", "host")):
        store.image(
            task(tmp_path / "tasks", f"FROM {parent}\nENV N={number}\nWORKDIR /w{number}\n")
        )
    (tmp_path / "images" / "layers" / "host-123").mkdir()
    (tmp_path / "images" / "building-mark-x").mkdir()
    (tmp_path / "images" / "pulls" / "x").mkdir(parents=True)
    return tmp_path / "images"


def task(tasks: Path, dockerfile: str) -> Path:
    folder = tasks / f"t{len(list(tasks.glob('*')))}" / "environment"
    folder.mkdir(parents=True)
    (folder / "Dockerfile").write_text(dockerfile)
    return folder


def age(path: Path) -> None:
    past = time.time() - 30 * 86400
    os.utime(path, (past, past))


def layers(root: Path) -> set[str]:
    return {path.name for path in (root / "layers").iterdir()}


def test_what_was_used_lately_stays(root: Path, tmp_path: Path) -> None:
    before = layers(root)
    assert prune(ImageStore(root), [tmp_path], unused_days=7, names=True) == Pruned((), 0, 0, 2)
    assert layers(root) == before
    assert not list(root.glob("building-*"))


def test_what_was_not_used_goes_and_is_built_again_when_asked_for(
    root: Path, tmp_path: Path
) -> None:
    for path in root.glob("built/*.json"):
        age(path)
    environment = tmp_path / "tasks" / "t1" / "environment"
    ImageStore(root).image(environment)  # which is a use of it
    store = ImageStore(root)
    assert prune(store, [], unused_days=7) == Pruned((), 2, 2, 2)
    assert store.names() == ("host", "unused", "used")
    other = tmp_path / "tasks" / "t0" / "environment"
    assert all(folder.is_dir() for folder in store.folders(store.image(other)))


def test_names_go_only_if_no_task_starts_from_them(root: Path, tmp_path: Path) -> None:
    for path in root.glob("names/*.json"):
        age(path)
    store = ImageStore(root)
    assert prune(store, [tmp_path / "tasks"], unused_days=7).names == ()
    done = prune(store, [tmp_path / "tasks"], unused_days=7, names=True)
    assert done.names == ("unused",)
    assert store.names() == ("host", "used")
    for number in range(3):
        store.image(tmp_path / "tasks" / f"t{number}" / "environment")


def test_layers_of_what_stays_stay_and_so_does_what_is_beneath_all(
    root: Path, tmp_path: Path
) -> None:
    for path in (*root.glob("names/*.json"), *root.glob("built/*.json")):
        age(path)
    store = ImageStore(root)
    prune(store, [tmp_path / "tasks"], unused_days=7, names=True)
    used = store.named("used")
    assert used
    assert layers(root) == {"host-123", *used.layers}


def test_while_a_process_may_open_sandboxes_nothing_goes(root: Path, tmp_path: Path) -> None:
    user = ImageStore(root)
    before = layers(root)
    with pytest.raises(ImageError, match="in use by a process"):
        prune(ImageStore(root), [], unused_days=0, names=True)
    assert layers(root) == before
    del user
    assert prune(ImageStore(root), [], unused_days=0, names=True).built == 3
