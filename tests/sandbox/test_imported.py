"""Images of others: in every form they come in, held to their digests, and named for FROM."""

import gzip
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from katcore.errors import ImageError, ImageMissingError
from katcore.sandbox.image import Image, ImageStore
from katcore.sandbox.imported import import_image
from tests.sandbox.images import (
    Pack,
    entry,
    layer,
    write_archive,
    write_docker,
    write_layout,
)

LAYERS = (
    layer("bin/", ("bin/sh", b"shell"), ("gone", b"x")),
    layer((".wh.gone", b""), ("a", b"2")),
)
OWN: dict[str, Any] = {"Env": ["PATH=/own", "A=b=c"], "WorkingDir": "/srv"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


def contents(root: Path, image: Image | None) -> dict[str, str]:
    assert image
    (folder,) = ImageStore(root).folders(image)
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def made(tmp_path: Path, form: str) -> Path:
    if form == "docker":
        return write_docker(tmp_path / "d.tar", LAYERS, "own:1", **OWN)
    folder = write_layout(tmp_path / "layout", LAYERS, name="own:1", **OWN)
    if form == "archive":
        return write_archive(tmp_path / "o.tar", folder)
    if form == "compressed":
        path = write_archive(tmp_path / "o.tar", folder)
        (tmp_path / "o.tgz").write_bytes(gzip.compress(path.read_bytes()))
        return tmp_path / "o.tgz"
    return folder


@pytest.mark.parametrize("form", ["folder", "archive", "compressed", "docker"])
def test_each_form_gives_the_same_image(tmp_path: Path, root: Path, form: str) -> None:
    store = ImageStore(root)
    assert import_image(store, made(tmp_path, form)) == "own:1"
    image = store.named("own:1")
    assert image
    assert (image.env, image.workdir, image.is_whole) == (
        {"PATH": "/own", "A": "b=c"},
        "/srv",
        True,
    )
    assert contents(root, image) == {"bin/sh": "shell", "a": "2"}
    assert store.names() == ("host", "own:1")


def test_a_root_file_system_needs_a_name(tmp_path: Path, root: Path) -> None:
    (tmp_path / "root.tar.gz").write_bytes(gzip.compress(LAYERS[0]))
    store = ImageStore(root)
    with pytest.raises(ImageError, match="--name"):
        import_image(store, tmp_path / "root.tar.gz")
    assert import_image(store, tmp_path / "root.tar.gz", "mine") == "mine"
    assert contents(root, store.named("mine")) == {"bin/sh": "shell", "gone": "x"}


def test_a_dockerfile_starts_from_it(tmp_path: Path, root: Path) -> None:
    store = ImageStore(root)
    import_image(store, made(tmp_path, "folder"), "registry.example/a/b:latest")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "b").write_text("3")
    (tmp_path / "e" / "Dockerfile").write_text("FROM registry.example/a/b\nENV C=d\nCOPY b b\n")
    image = store.image(tmp_path / "e")
    assert image.is_whole
    assert (image.workdir, image.env["A"], image.env["C"]) == ("/srv", "b=c", "d")
    top, below = store.folders(image)
    assert (top / "srv" / "b").read_text() == "3"
    assert (below / "bin" / "sh").exists()


def test_twice_it_is_unpacked_once(tmp_path: Path, root: Path) -> None:
    store, path = ImageStore(root), made(tmp_path, "docker")
    import_image(store, path, "one")
    (layer_folder,) = (root / "layers").iterdir()
    before = layer_folder.stat().st_ino
    import_image(store, path, "two")
    assert [item.stat().st_ino for item in (root / "layers").iterdir()] == [before]
    assert store.named("one") == store.named("two")


@pytest.mark.parametrize("which", ["layer", "manifest", "config"])
def test_what_is_not_as_its_digest_says_is_refused(tmp_path: Path, root: Path, which: str) -> None:
    folder = made(tmp_path, "folder")
    blobs = {path: path.read_bytes() for path in (folder / "blobs" / "sha256").iterdir()}
    marks = {"layer": b"\x1f\x8b", "manifest": b'{"schemaVersion"', "config": b'{"architecture"'}
    path = next(path for path, data in blobs.items() if data.startswith(marks[which]))
    data = blobs[path]
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if which == "layer" else data + b" ")
    store = ImageStore(root)
    with pytest.raises(ImageError, match="not what its digest says"):
        import_image(store, folder)
    assert store.names() == ("host",)
    assert not list((root / "layers").iterdir())
    assert not list(root.glob("building-*"))


def test_a_layer_of_docker_save_is_held_to_the_configuration(tmp_path: Path, root: Path) -> None:
    path = made(tmp_path, "docker")
    data = path.read_bytes()
    assert data.count(b"shell") == 1
    path.write_bytes(data.replace(b"shell", b"shelf"))
    with pytest.raises(ImageError, match="not what its digest says"):
        import_image(ImageStore(root), path)


def test_one_for_other_machines_only_is_refused(tmp_path: Path, root: Path) -> None:
    folder = made(tmp_path, "folder")
    index = json.loads((folder / "index.json").read_text())
    index["manifests"] = index["manifests"][:1]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ImageError, match="there is: plan9/mips"):
        import_image(ImageStore(root), folder)


@pytest.mark.parametrize(
    "content", [b"", b"no archive", layer(("manifest.json", b"[{}]")), layer(("index.json", b"{}"))]
)
def test_what_is_no_image_says_so(tmp_path: Path, root: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ImageError):
        import_image(ImageStore(root), tmp_path / "x")
    with pytest.raises(ImageError, match="No such file"):
        import_image(ImageStore(root), tmp_path / "nothing")


@pytest.mark.parametrize("pack", [gzip.compress, zstd.compress])
def test_a_layer_that_is_cut_off_says_so(tmp_path: Path, root: Path, pack: Pack) -> None:
    def cut(data: bytes) -> bytes:
        return pack(data)[:-9]

    content = layer(("a", os.urandom(10_000)))
    folder = write_layout(tmp_path / "layout", [content], name="z", packers=[cut])
    with pytest.raises(ImageError, match="cut off"):
        import_image(ImageStore(root), folder)


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_a_layer_that_is_no_archive_says_so(tmp_path: Path, root: Path, magic: bytes) -> None:
    folder = write_layout(
        tmp_path / "layout", [b"x"], name="z", packers=[lambda _: magic + b" rest"]
    )
    with pytest.raises(ImageError, match="cut off"):
        import_image(ImageStore(root), folder)


def test_links_where_a_sandbox_mounts_are_refused(tmp_path: Path, root: Path) -> None:
    linked = entry("proc", tarfile.SYMTYPE, "/usr")
    folder = write_layout(tmp_path / "layout", [layer(linked)], name="p")
    with pytest.raises(ImageError, match="/proc of the image is a link"):
        import_image(ImageStore(root), folder)


def test_one_whose_files_are_gone_is_missing_and_one_that_was_built_is_built_again(
    tmp_path: Path, root: Path
) -> None:
    store = ImageStore(root)
    import_image(store, made(tmp_path, "folder"), "own")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "Dockerfile").write_text("FROM own\nCOPY Dockerfile /d\n")
    image = store.image(tmp_path / "e")
    shutil.rmtree(store.folders(image)[0])
    assert ImageStore(root).image(tmp_path / "e") == image
    assert store.folders(image)[0].is_dir()
    shutil.rmtree(store.folders(image)[1])
    with pytest.raises(ImageMissingError, match="no image named 'own'"):
        ImageStore(root).image(tmp_path / "e")
