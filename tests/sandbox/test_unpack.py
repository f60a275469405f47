"""Unpacking: deletions are honoured, and nothing ever lands outside the folder."""

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katcore.errors import ImageError
from katcore.sandbox.unpack import resolve, unpack_layer
from tests.sandbox.images import entry, layer


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    return tmp_path / "root"


def unpack(root: Path, *layers: bytes) -> dict[str, str]:
    for item in layers:
        unpack_layer(io.BytesIO(item), root)
    return files(root)


def files(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_text()
        else:
            found[name] = "/" if path.is_dir() else "special"
    return found


def link(name: str, target: str) -> tarfile.TarInfo:
    made: tarfile.TarInfo = entry(name, tarfile.SYMTYPE, target)
    return made


def hard(name: str, target: str) -> tarfile.TarInfo:
    made: tarfile.TarInfo = entry(name, tarfile.LNKTYPE, target)
    return made


def test_later_layers_are_on_top(root: Path) -> None:
    one = layer("d/", ("d/a", b"1"), ("d/b", b"1"), link("l", "d/a"))
    two = layer(("d/a", b"2"), ("d/new/x", b"2"), ("l", b"a file now"))
    assert unpack(root, one, two) == {
        "d": "/",
        "d/a": "2",
        "d/b": "1",
        "d/new": "/",
        "d/new/x": "2",
        "l": "a file now",
    }


def test_what_a_layer_deletes_is_gone(root: Path) -> None:
    one = layer("d/", ("d/a", b"1"), ("d/b", b"1"), "e/", ("e/x", b"1"), link("l", "d"))
    two = layer(("d/.wh.a", b""), (".wh.e", b""), (".wh.l", b""), (".wh.never-there", b""))
    assert unpack(root, one, two) == {"d": "/", "d/b": "1"}


@pytest.mark.parametrize("order", [1, -1])
def test_an_emptied_folder_keeps_what_its_own_layer_brings(root: Path, order: int) -> None:
    one = layer("d/", ("d/a", b"1"), "d/s/", ("d/s/old", b"1"))
    parts = [("d/.wh..wh..opq", b""), ("d/b", b"2"), ("d/s/new", b"2")]
    two = layer(*parts[::order])
    assert unpack(root, one, two) == {"d": "/", "d/b": "2", "d/s": "/", "d/s/new": "2"}


def test_a_deletion_does_not_hit_what_the_same_layer_brings(root: Path) -> None:
    both = layer(("a", b"new"), (".wh.a", b""))
    assert unpack(root, layer(("a", b"old")), both) == {"a": "new"}


def test_a_file_may_become_a_folder_and_back(root: Path) -> None:
    assert unpack(root, layer(("a", b"1")), layer("a/", ("a/b", b"2"))) == {"a": "/", "a/b": "2"}
    assert unpack(root, layer(("a", b"3"))) == {"a": "3"}


def test_paths_go_through_links_as_in_the_image(root: Path) -> None:
    one = layer("usr/", "usr/lib/", link("lib", "usr/lib"), link("abs", "/usr/lib"))
    two = layer(("lib/a", b"1"), ("abs/b", b"2"))
    found = unpack(root, one, two)
    assert (found["usr/lib/a"], found["usr/lib/b"]) == ("1", "2")
    assert found["lib"] == "-> usr/lib"


@pytest.mark.parametrize(
    "items",
    [
        [("../outside/x", b"x")],
        [("/../../outside/x", b"x")],
        [("a/../../outside/x", b"x")],
        [link("l", "../outside"), ("l/x", b"x")],
        [link("l", "../../../../../../../../outside"), ("l/x", b"x")],
        [link("l", "../outside"), ("l/kept", b"x")],
        [link("l", "../outside/kept"), ("l", b"x")],
        [link("l", "../outside"), ("l/.wh.kept", b"")],
        [link("l", "../outside"), ("l/.wh..wh..opq", b"")],
        [link("l", ".."), link("m", "l/outside"), ("m/x", b"x")],
        [link("l", "../outside"), entry("l/d", tarfile.DIRTYPE)],
    ],
)
def test_nothing_is_written_outside(root: Path, items: list[object]) -> None:
    unpack(root, layer(*items))  # type: ignore[arg-type]
    outside = root.parent / "outside"
    assert files(outside) == {"kept": "kept"}
    assert sorted(path.name for path in root.parent.iterdir()) == ["outside", "root"]


def test_links_to_the_machine_stay_links_and_are_written_through_by_nobody(root: Path) -> None:
    absolute = str(root.parent / "outside")
    found = unpack(root, layer(link("l", absolute), ("l/x", b"x")))
    assert found["l"] == f"-> {absolute}"
    assert files(root.parent / "outside") == {"kept": "kept"}
    assert found[f"{absolute.lstrip('/')}/x"] == "x", "below the root, as the image would see it"


@pytest.mark.parametrize("target", ["../outside/kept", "/etc/passwd", "nothing"])
def test_a_hard_link_to_what_is_not_in_the_image_is_refused(root: Path, target: str) -> None:
    with pytest.raises(ImageError, match="which is no file"):
        unpack(root, layer(hard("h", target)))


def test_a_hard_link_through_a_link_that_leads_out_is_refused(root: Path) -> None:
    with pytest.raises(ImageError, match="which is no file"):
        unpack(root, layer(link("l", "../outside"), hard("h", "l/kept")))


def test_a_hard_link_inside_is_one_file(root: Path) -> None:
    unpack(root, layer(("a", b"1"), hard("h", "a")))
    assert (root / "a").stat().st_ino == (root / "h").stat().st_ino


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_are_refused(root: Path, kind: bytes) -> None:
    with pytest.raises(ImageError, match="is a device"):
        unpack(root, layer(entry("dev/sda", kind)))


@pytest.mark.parametrize("name", ["..", ".", "/", "a/.."])
def test_the_root_itself_is_not_replaced(root: Path, name: str) -> None:
    before = root.stat().st_ino
    unpack(root, layer(entry(name, tarfile.DIRTYPE, mode=0o755)))
    assert root.stat().st_ino == before
    assert files(root) == {}


def test_modes_are_kept_without_set_user_id_and_the_owner_may_read(root: Path) -> None:
    items = [
        entry("s", mode=0o4755),
        entry("n", mode=0o000),
        entry("d", tarfile.DIRTYPE, mode=0o1555),
    ]
    unpack(root, layer(*items))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in root.iterdir()}
    assert modes == {"s": 0o755, "n": 0o400, "d": 0o1755}


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 600, 1100])
def test_one_that_is_cut_off_is_refused(root: Path, num_bytes: int) -> None:
    data = layer(("a", b"x" * 2000))[:num_bytes]
    with pytest.raises(ImageError, match="cut off"):
        unpack(root, data)


def test_links_in_a_circle_are_refused(root: Path) -> None:
    with pytest.raises(ImageError, match="circle"):
        unpack(root, layer(link("a", "b"), link("b", "a"), ("a/x", b"x")))


def test_what_is_deleted_below_a_file_is_not_there(root: Path) -> None:
    unpack(root, layer(("a", b"x"), ("a/.wh.b", b"")))
    assert (root / "a").read_bytes() == b"x"


def test_a_link_to_nothing_is_refused(root: Path) -> None:
    with pytest.raises(ImageError, match="a is a link to nothing"):
        unpack(root, layer(link("a", "")))


PARTS = st.sampled_from(["a", "b", "..", ".", "", "c"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)
ITEMS = st.one_of(
    st.tuples(NAMES, st.just(b"x")),
    st.builds(link, NAMES, NAMES),
    st.builds(link, NAMES, NAMES.map("/".__add__)),
    st.builds(hard, NAMES, NAMES),
    NAMES.map(lambda name: entry(name, tarfile.DIRTYPE)),
    NAMES.map(lambda name: (f"{name}/.wh.a", b"")),
    NAMES.map(lambda name: (f"{name}/.wh..wh..opq", b"")),
)


@given(layers=st.lists(st.lists(ITEMS, max_size=8), max_size=3))
def test_whatever_an_archive_says_nothing_leaves_the_folder(
    tmp_path_factory: pytest.TempPathFactory, layers: list[list[object]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a").write_text("kept")
    root = folder / "b" / "root"
    root.mkdir(parents=True)
    for items in layers:
        try:
            unpack_layer(io.BytesIO(layer(*items)), root)  # type: ignore[arg-type]
        except ImageError:
            break
    assert (folder / "a").read_text() == "kept"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert [path.name for path in (folder / "b").iterdir()] == ["root"]


def test_a_path_is_found_as_the_image_sees_it(root: Path) -> None:
    (root / "d").mkdir()
    (root / "l").symlink_to("/d/../d")
    (root / "up").symlink_to("../../..")
    assert resolve(root, "l/x") == root / "d" / "x"
    assert resolve(root, "up/d") == root / "d"
    assert resolve(root, "l") == root / "l"
    assert resolve(root, "../../x") == root / "x"
