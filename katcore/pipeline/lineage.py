"""Which models a model was made from, by the hashes of their weights."""

import hashlib
import json
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
        with path.open("rb") as file:
            found.add(hashlib.file_digest(file, "sha256").hexdigest())
    return frozenset(found)
