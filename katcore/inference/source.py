"""A model that exists: a Hugging Face folder of one's own, or a pinned revision on the hub.

Only data is taken: configs, tokenizers, templates, and weights as safetensors. No code of a model is, and no
pickled weights, which could hold some.
"""

import json
import os
import shutil
from importlib import import_module
from pathlib import Path

from katcore.errors import ConfigError, StageError

_TAKEN = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model", "LICENSE*")
_ROOM = 1 << 30


def copy(folder: Path, out: Path) -> dict[str, float]:
    """Copy a model folder to `out`.

    Raises:
        ConfigError: it is none; says what is missing.
        StageError: too little disk.
    """
    files = _taken(folder)
    _check(folder, {path.name for path in files})
    size = sum(path.stat().st_size for path in files)
    _check_room(out, size)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in files:
        shutil.copy2(path, out / path.name)
    return {"num_bytes": float(size)}


def download(repo: str, revision: str, out: Path) -> dict[str, float]:
    """Download a model of the hub to `out`; what an earlier try has is kept.

    `HF_ENDPOINT` and `HF_TOKEN` say where and who, as always with the hub.

    Raises:
        ConfigError: it is not a model that can be taken; says what is missing.
        StageError: no such repository or revision, no right to read it, or no network.
    """
    hub = import_module("huggingface_hub")
    try:
        hub.snapshot_download(
            repo, revision=revision, local_dir=out, allow_patterns=list(_TAKEN), token=None
        )
    except (OSError, ValueError) as error:
        raise StageError(
            f"cannot download {repo} at {revision}: {error}; the hub is needed once. Without it, bring the"
            " folder and set model: {kind: folder, path: ...}"
        ) from error
    shutil.rmtree(out / ".cache", ignore_errors=True)
    files = _taken(out)
    _check(out, {path.name for path in files})
    return {"num_bytes": float(sum(path.stat().st_size for path in files))}


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of all that is taken: hashing weights would take minutes.

    Raises:
        ConfigError: the folder is no model; says what is missing.
    """
    files = _taken(folder)
    _check(folder, {path.name for path in files})
    return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]


def _taken(folder: Path) -> list[Path]:
    return sorted({path for pattern in _TAKEN for path in folder.glob(pattern) if path.is_file()})


def _check(folder: Path, names: set[str]) -> None:
    needed = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        needed |= set(json.loads(index.read_bytes())["weight_map"].values())
    else:
        needed.add("model.safetensors")
    if missing := sorted(needed - names):
        raise ConfigError(
            f"{folder}: no model that can be taken: {', '.join(missing)} is missing; a Hugging Face folder"
            " with a fast tokenizer and safetensors would do"
        )


def _check_room(out: Path, size: int) -> None:
    there = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < size + _ROOM:
        raise StageError(
            f"{os.fspath(there)}: {free >> 20} MiB free, the model's copy needs {(size + _ROOM) >> 20};"
            " make room and run it again"
        )
