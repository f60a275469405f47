"""Which models a model was made from, by the hashes of their weights."""

import hashlib
import json
from functools import cache
from pathlib import Path

MANIFEST = "manifest.json"


def ancestors(model: Path) -> frozenset[str]:
    """The hashes of the weights of a model folder, and of all that it is known to be made from.

    A stage, or `kat sft|rl|distill FILE`, notes them in the manifest beside its model.
    """
    manifest = model.parent / MANIFEST
    noted = json.loads(manifest.read_bytes()) if manifest.exists() else {}
    return frozenset(noted.get("ancestors", ())) | _weights(model)


def _weights(model: Path) -> frozenset[str]:
    found = set()
    for path in model.glob("*.safetensors"):
        state = path.stat()
        found.add(_digest(path, state.st_size, state.st_mtime_ns))
    return frozenset(found)


@cache
def _digest(path: Path, size: int, changed_ns: int) -> str:
    """Of a file in that state; weights take minutes to read, so once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
