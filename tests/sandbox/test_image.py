"""The image store: once per content, whole or not at all, and never a byte outside it."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from katcore.errors import ImageMissingError, TaskError
from katcore.sandbox.image import Image, ImageStore


def environment(folder: Path, dockerfile: str, **files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "Dockerfile").write_text(dockerfile)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def archive(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def contents(store: ImageStore, image: Image) -> dict[str, str]:
    """Regular files by path, the topmost layer's if there are several."""
    found: dict[str, str] = {}
    for layer in reversed(store.folders(image)):
        for path in layer.rglob("*"):
            if path.is_file():
                found[str(path.relative_to(layer))] = path.read_text()
    return found


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def test_copy_env_and_workdir(store: ImageStore, tmp_path: Path) -> None:
    folder = environment(
        tmp_path / "e",
        "FROM host\nENV A=1\nWORKDIR /w\nCOPY a b sub/\nCOPY a /named\nWORKDIR deeper\nCOPY . .\nENV A=2 B=3\n",  # noqa: E501
        a="A",
        b="B",
    )
    image = store.image(folder)
    assert image.workdir == "/w/deeper"
    assert image.env == {"A": "2", "B": "3"}
    found = contents(store, image)
    assert found.pop("w/deeper/Dockerfile")
    assert found == {
        "w/sub/a": "A", "w/sub/b": "B", "named": "A", "w/deeper/a": "A", "w/deeper/b": "B",
    }  # fmt: skip


def test_run_sees_what_is_before_it_and_its_changes_stay(store: ImageStore, tmp_path: Path) -> None:
    seen = []

    def run(image: Image, command: str) -> bytes:
        seen.append((contents(store, image), dict(image.env), image.workdir, command))
        return archive(made="by run")

    text = "FROM host\nWORKDIR /w\nENV A=1\nCOPY a a\nRUN make it\nCOPY a made\n"
    image = store.image(environment(tmp_path / "e", text, a="A"), run=run)
    assert seen == [({"w/a": "A"}, {"A": "1"}, "/w", "make it")]
    assert contents(store, image) == {"w/a": "A", "made": "by run", "w/made": "A"}


def test_run_without_a_backend_is_refused(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="Dockerfile:2: RUN needs a sandbox backend"):
        store.image(environment(tmp_path / "e", "FROM host\nRUN x\n"))


def test_a_named_image_is_what_others_start_from(store: ImageStore, tmp_path: Path) -> None:
    base = environment(tmp_path / "b", "FROM host\nENV A=1\nWORKDIR /w\nCOPY a a\n", a="A")
    store.build("base", base)
    image = store.image(environment(tmp_path / "e", "FROM base\nCOPY b b\n", b="B"))
    assert (image.env, image.workdir) == ({"A": "1"}, "/w")
    assert contents(store, image) == {"w/a": "A", "w/b": "B"}
    assert store.names() == ("host", "base")


def test_an_unknown_image_lists_the_known_ones(store: ImageStore, tmp_path: Path) -> None:
    store.build("base", environment(tmp_path / "b", "FROM host\n"))
    with pytest.raises(ImageMissingError, match="no image named 'bose'; known: host, base;"):
        store.image(environment(tmp_path / "e", "FROM bose\n"))


def test_a_renamed_parent_is_another_image(store: ImageStore, tmp_path: Path) -> None:
    child = environment(tmp_path / "e", "FROM base\n")
    store.build("base", environment(tmp_path / "1", "FROM host\nCOPY a a\n", a="1"))
    first = ImageStore(tmp_path / "images").image(child)
    store.build("base", environment(tmp_path / "2", "FROM host\nCOPY a a\n", a="2"))
    second = ImageStore(tmp_path / "images").image(child)
    assert first.key != second.key
    assert contents(store, first)["a"] == "1"
    assert contents(store, second)["a"] == "2"


@pytest.mark.parametrize("source", ["../secret", "/etc/passwd", "out", "none", "../e2/a"])
def test_copy_cannot_take_from_outside(store: ImageStore, tmp_path: Path, source: str) -> None:
    (tmp_path / "secret").write_text("secret")
    environment(tmp_path / "e2", "FROM host\n", a="A")
    folder = environment(tmp_path / "e", f"FROM host\nCOPY {source} x\n")
    (folder / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(TaskError, match=rf"Dockerfile:2: COPY: no '{source}' here"):
        store.image(folder)


@pytest.mark.parametrize("target", ["../../../x", "/../../x", "a/../../../../x"])
def test_a_destination_stays_inside(store: ImageStore, tmp_path: Path, target: str) -> None:
    image = store.image(environment(tmp_path / "e", f"FROM host\nCOPY a {target}\n", a="A"))
    assert contents(store, image) == {"x": "A"}


@pytest.mark.parametrize(
    "then", ["COPY a /d/link/a", "WORKDIR /d/link/w", "COPY sub /d", "COPY a /d/link/"]
)
def test_nothing_is_written_through_a_link(store: ImageStore, tmp_path: Path, then: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = environment(tmp_path / "e", f"FROM host\nCOPY d /d\n{then}\n", a="A")
    (folder / "d").mkdir()
    (folder / "d" / "link").symlink_to(outside)
    (folder / "sub" / "link").mkdir(parents=True)
    (folder / "sub" / "link" / "a").write_text("A")
    with pytest.raises(TaskError, match=r"Dockerfile:3: .* leads through the link"):
        store.image(folder)
    assert not list(outside.iterdir())


def test_links_in_a_copied_folder_stay_links(store: ImageStore, tmp_path: Path) -> None:
    folder = environment(tmp_path / "e", "FROM host\nCOPY d /d\n")
    (folder / "d").mkdir()
    (folder / "d" / "link").symlink_to("/etc/shadow")
    image = store.image(folder)
    assert os.readlink(store.folders(image)[0] / "d" / "link") == "/etc/shadow"


def test_modes_are_kept(store: ImageStore, tmp_path: Path) -> None:
    folder = environment(tmp_path / "e", "FROM host\nCOPY a /\n", a="A")
    (folder / "a").chmod(0o751)
    image = store.image(folder)
    assert (store.folders(image)[0] / "a").stat().st_mode & 0o7777 == 0o751


def test_equal_content_is_built_once_wherever_it_is(store: ImageStore, tmp_path: Path) -> None:
    runs = []

    def run(image: Image, command: str) -> bytes:
        runs.append(command)
        return archive()

    one = store.image(environment(tmp_path / "1", "FROM host\nCOPY a a\nRUN x\n", a="A"), run=run)
    two = store.image(environment(tmp_path / "2", "FROM host\nCOPY a a\nRUN x\n", a="A"), run=run)
    other = store.image(environment(tmp_path / "3", "FROM host\nCOPY a a\nRUN x\n", a="B"), run=run)
    assert one == two != other
    assert len(runs) == 2


@pytest.mark.parametrize("change", ["content", "name", "mode", "link", "Dockerfile"])
def test_any_change_is_another_image(tmp_path: Path, change: str) -> None:
    folder = environment(tmp_path / "e", "FROM host\nCOPY . /\n", a="A")
    (folder / "l").symlink_to("a")
    before = ImageStore(tmp_path / "images").image(folder).key
    if change == "content":
        (folder / "a").write_text("B")
    elif change == "name":
        (folder / "a").rename(folder / "b")
    elif change == "mode":
        (folder / "a").chmod(0o700)
    elif change == "link":
        (folder / "l").unlink()
        (folder / "l").symlink_to("b")
    else:
        (folder / "Dockerfile").write_text("FROM host\nCOPY . /x\n")
    assert ImageStore(tmp_path / "images").image(folder).key != before


def test_at_once_it_is_still_built_once(tmp_path: Path) -> None:
    folder = environment(tmp_path / "e", "FROM host\nRUN x\n")
    runs: list[str] = []
    barrier = threading.Barrier(8)

    def run(image: Image, command: str) -> bytes:
        runs.append(command)
        return archive(made="x")

    def build(_: int) -> Image:
        store = ImageStore(tmp_path / "images")
        barrier.wait(10)
        return store.image(folder, run=run)

    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(build, range(8)))
    assert len(runs) == 1
    assert len({image.key for image in images}) == 1


_KILLED = """
import sys, time
from pathlib import Path
from katcore.sandbox.image import ImageStore

def run(image, command):
    print("running", flush=True)
    time.sleep(60)

ImageStore(Path(sys.argv[1])).image(Path(sys.argv[2]), run=run)
"""


def test_half_built_is_not_taken_for_finished(tmp_path: Path) -> None:
    folder = environment(tmp_path / "e", "FROM host\nCOPY a a\nRUN x\nCOPY a b\n", a="A")
    arguments = [str(tmp_path / "images"), str(folder)]
    process = subprocess.Popen([sys.executable, "-c", _KILLED, *arguments], stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"running\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = ImageStore(tmp_path / "images")
    image = store.image(folder, run=lambda image, command: archive(made="x"))
    assert contents(store, image) == {"a": "A", "made": "x", "b": "A"}


def test_a_run_that_fails_leaves_no_image(store: ImageStore, tmp_path: Path) -> None:
    folder = environment(tmp_path / "e", "FROM host\nRUN x\n")

    def fails(image: Image, command: str) -> bytes:
        raise OSError("no luck")

    with pytest.raises(OSError, match="no luck"):
        store.image(folder, run=fails)
    assert contents(store, store.image(folder, run=lambda *_: archive(made="x"))) == {"made": "x"}


def test_repositories_of_an_imported_image_are_cut_too(store: ImageStore, tmp_path: Path) -> None:
    ran = []

    def run(image: Image, command: str) -> bytes:
        ran.append(command)
        return archive(cut="yes")

    store.add("base", Image("k", ("k",), is_whole=True), lambda root: (root / ".git").mkdir())
    image = store.image(environment(tmp_path / "e", "FROM base\n"), run=run)
    assert contents(store, image)["cut"] == "yes"
    (command,) = ran
    assert command.startswith("exec bash -c ")
    assert "pack-objects" in command
    store.build("own", environment(tmp_path / "own", "FROM base\n"), run=run)
    store.image(environment(tmp_path / "of-own", "FROM own\nWORKDIR /x\n"), run=run)
    assert len(ran) == 1
    kept = store.image(environment(tmp_path / "k", "FROM base\n"), run=run, keeps_history=True)
    assert "cut" not in contents(store, kept)
