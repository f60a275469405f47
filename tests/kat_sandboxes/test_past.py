"""Where the git repositories of an image are, by its archive."""

import io
import tarfile

import pytest

from kat_sandboxes.docker.past import repositories


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            entry.size = 0 if entry.isdir() else 3000
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("a/", "a/b", "objects/", "refs"), []),
        (("./r/", "./r/.git/", "./r/.git/objects/", "./r/.git/refs/"), ["/r", "/r/.git"]),
        (("w/.git",), ["/w"]),
        (("m.git/objects/", "m.git/refs/"), ["/m.git"]),
        (("s/objects/info/", "s/objects/pack/"), ["/s/objects"]),
    ],
)
@pytest.mark.parametrize("size", [7, 512, 1 << 20])
def test_repositories_are_found_in_anarchive(
    names: tuple[str, ...], found: list[str], size: int
) -> None:
    data = archive(*names)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert repositories(pieces) == found
