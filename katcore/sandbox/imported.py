"""Brings images of others into the store: from archives, from folders, from a registry."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from katcore.errors import ImageError
from katcore.sandbox import oci
from katcore.sandbox.image import HOST, Image, ImageStore
from katcore.sandbox.registry import Reference, pull


def import_image(store: ImageStore, path: Path, name: str = "") -> str:
    """Unpack an image and give it a name; by default the one it has. Returns the name.

    Raises:
        ImageError: it is no image, is not whole, holds what no image may, or no name is known.
    """
    with oci.opened(path) as (files, manifest):
        name = name or next((item for item in manifest.names if item), "")
        if not name:
            raise ImageError(f"{path}: it says no name of its own; give one with --name")
        if name == HOST:
            raise ImageError(f"{HOST!r} is this machine's own; give another name")
        key = manifest.digest.replace(":", "-")[:47]
        image = Image(key, (key,), dict(manifest.env), manifest.workdir, is_whole=True)
        try:
            store.add(name, image, lambda folder: oci.unpack(files, manifest, folder))
        except OSError as error:
            raise ImageError(f"{path}: cannot be unpacked: {error}") from error
    return name


async def pull_image(
    store: ImageStore,
    root: Path,
    text: str,
    *,
    name: str = "",
    login: str = "",
    report: Callable[[str], None],
) -> str:
    """Pull an image from a registry; what was fetched stays in `root` until the image is whole.

    Raises:
        ImageError: as `katcore.sandbox.registry.pull` and `import_image`.
    """
    reference = Reference.parse(text)
    folder = (
        root
        / "pulls"
        / hashlib.sha256(str(reference.url / reference.version).encode()).hexdigest()[:16]
    )
    folder.mkdir(parents=True, exist_ok=True)
    await pull(reference, folder, login=login, report=report)
    report("unpacking")
    found = import_image(store, folder, name or text)
    shutil.rmtree(folder)
    return found
