"""Archives of changes that lie: nothing is read or written outside the folder, and nothing is filled."""

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from katcore.errors import ImageError
from katcore.sandbox.unpack import unpack_changes


def member(name: str, data: bytes = b"evil", **said: Any) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    for key, value in said.items():
        setattr(entry, key, value)
    entry.size = len(data) if entry.isreg() else 0
    return entry, data


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=kind, linkname=to)


def deleted(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, b"", pax_headers={"KATCORE.deleted": "1"})


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry, data in members:
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the layer, with a file that must not be read or changed."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "file").write_text("mine")
    return folder


def unpack(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    unpack_changes(archive(*members), tmp_path / "layer")
    return tmp_path / "layer"


@pytest.mark.parametrize(
    "depth", ["../outside/", "../../../../../../..{outside}/", "a/../../outside/"]
)
def test_no_name_leads_out(tmp_path: Path, outside: Path, depth: str) -> None:
    name = depth.format(outside=outside)
    layer = unpack(tmp_path, member(f"{name}file"), member(f"{name}new"), deleted(f"{name}gone"))
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"file": "mine"}
    assert len([path for path in layer.rglob("*") if not path.is_dir()]) == 3


def test_an_absolute_name_is_the_image_s(tmp_path: Path, outside: Path) -> None:
    layer = unpack(tmp_path, member(f"{outside}/file"), deleted(f"{outside}/other"))
    assert (outside / "file").read_text() == "mine"
    assert (layer / str(outside)[1:] / "file").read_text() == "evil"


@pytest.mark.parametrize("to", ["../outside", "{outside}", "no/../../outside", "second"])
def test_nothing_goes_through_a_link(tmp_path: Path, outside: Path, to: str) -> None:
    target = to.format(outside=outside)
    layer = unpack(
        tmp_path,
        link("second", str(outside)),
        link("way", target),
        member("way/file"),
        member("way/deep/new"),
        deleted("way/gone"),
        member("way/folder", b"", type=tarfile.DIRTYPE, mode=0o777),
    )
    assert {path.name for path in outside.iterdir()} == {"file"}
    assert (outside / "file").read_text() == "mine"
    assert (layer / "way").readlink() == Path(target)


@pytest.mark.parametrize("to", ["../outside/file", "{outside}/file", "way/file"])
def test_no_hard_link_reaches_out(tmp_path: Path, outside: Path, to: str) -> None:
    way = link("way", str(outside))
    with pytest.raises(ImageError, match="which is no file"):
        unpack(tmp_path, way, link("hard", to.format(outside=outside), tarfile.LNKTYPE))
    assert (outside / "file").stat().st_nlink == 1


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(ImageError, match="a device"):
        unpack(tmp_path, member("dev", type=kind, devmajor=1, devminor=1))


def test_what_was_deleted_hides_and_is_no_other_device(tmp_path: Path) -> None:
    layer = unpack(tmp_path, deleted("a/gone"))
    found = (layer / "a" / "gone").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert found.st_rdev == os.makedev(0, 0)


def test_a_file_with_a_huge_hole_fills_no_disk(tmp_path: Path) -> None:
    entry, data = member("zeros", b"1\n0\n512\n" + bytes(504) + b"x" * 512)
    entry.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "zeros",
        "GNU.sparse.realsize": str(1 << 42),
    }
    with pytest.raises(ImageError, match="no sandbox says so"):
        unpack(tmp_path, (entry, data))
    assert list((tmp_path / "layer").iterdir()) == []


def test_set_user_id_bits_are_dropped(tmp_path: Path) -> None:
    layer = unpack(tmp_path, member("su", mode=0o6755))
    assert stat.S_IMODE((layer / "su").stat().st_mode) == 0o755


@pytest.mark.parametrize("data", [b"x" * 1024, archive(member("a", bytes(4096)))[:2000]])
def test_what_is_no_archive_is_an_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ImageError, match="no tar archive, or is cut off"):
        unpack_changes(data, tmp_path / "layer")


@pytest.mark.parametrize("name", [".", "/", "a/.."])
def test_the_root_itself_is_no_member(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="no sandbox says so"):
        unpack(tmp_path, member(name))
