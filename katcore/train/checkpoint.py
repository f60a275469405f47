"""Checkpoints: folders that are there whole or not at all.

    <path>/step-<number>/trainer.pt         step, weights, `scale`, and what the caller wants to find again
    <path>/step-<number>/rank-<number>.pt   state of the optimizer and of random numbers

A folder gets its name when everything in it is on disk; then older ones go. Several processes write to one
file system.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from katcore.errors import StageError
from katcore.train import ranks

_PREFIX = "step-"


def write(path: Path, step: int, whole: dict[str, Any], own: dict[str, Any]) -> None:
    """Write a checkpoint; `whole` is the first process's, `own` that of each. All have to call it."""
    folder = path / f"{_PREFIX}{step}"
    growing = path / f"growing-{step}"
    if ranks.rank() == 0:
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        _save(growing / "trainer.pt", whole)
    ranks.wait()
    _save(growing / f"rank-{ranks.rank()}.pt", own)
    ranks.wait()
    if ranks.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        _sync(growing)
        growing.rename(folder)
        _sync(path)
        for other in path.iterdir():
            if other != folder:
                shutil.rmtree(other)
    ranks.wait()


def read(path: Path, **scale: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The last checkpoint, as `write` was given it; None if there is none.

    Raises:
        StageError: its optimizer was spread otherwise than `scale` says.
    """
    folders = sorted(path.glob(f"{_PREFIX}*"), key=lambda found: int(found.name[len(_PREFIX) :]))
    if not folders:
        return None
    whole = torch.load(folders[-1] / "trainer.pt", weights_only=True, map_location="cpu")
    if whole["scale"] != scale:
        raise StageError(
            f"{folders[-1]} was made with {whole['scale']}, and this is {scale}: set `scale` as it was, or"
            f" remove {path} to begin again"
        )
    own = torch.load(folders[-1] / f"rank-{ranks.rank()}.pt", weights_only=True, map_location="cpu")
    return whole, own


def _save(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
