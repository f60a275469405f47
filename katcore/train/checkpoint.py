"""Checkpoints: folders that are there whole or not at all.

    <path>/step-<number>/trainer.pt         step, weights, `scale`, and what the caller wants to find again
    <path>/step-<number>/rank-<number>.pt   state of the optimizer and of random numbers

A folder gets its name when everything in it is on disk; then older ones go. So the last one is whole at every
instant, and only it is read. Of a step that is written again, the later folders are `step-<number>-1` and on.
Several processes write to one file system.
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
    growing = path / f"growing-{step}"
    if ranks.rank() == 0:
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        _save(growing / "trainer.pt", whole)
    ranks.wait()
    _save(growing / f"rank-{ranks.rank()}.pt", own)
    ranks.wait()
    if ranks.rank() == 0:
        _sync(growing)
        folder = path / _name(path, step)
        growing.rename(folder)
        _sync(path)
        for other in path.iterdir():
            if other != folder:
                # What a file system does not let go of now, goes with the next one.
                shutil.rmtree(other, ignore_errors=True)
    ranks.wait()


def read(path: Path, **scale: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The last checkpoint, as `write` was given it; None if there is none.

    Raises:
        StageError: its optimizer was spread otherwise than `scale` says.
    """
    last = max(path.glob(f"{_PREFIX}*"), key=_place, default=None)
    if last is None:
        return None
    whole = torch.load(last / "trainer.pt", weights_only=True, map_location="cpu")
    if whole["scale"] != scale:
        raise StageError(
            f"{last} was made with {whole['scale']}, and this is {scale}: set `scale` as it was, or"
            f" remove {path} to begin again"
        )
    own = torch.load(last / f"rank-{ranks.rank()}.pt", weights_only=True, map_location="cpu")
    return whole, own


def _place(folder: Path) -> tuple[int, int]:
    """The step of a checkpoint, and which of that step's it is."""
    step, _, again = folder.name.removeprefix(_PREFIX).partition("-")
    return int(step), int(again or 0)


def _name(path: Path, step: int) -> str:
    """What the next checkpoint of a step is called, so that it is the last one."""
    there = [again for at, again in map(_place, path.glob(f"{_PREFIX}*")) if at == step]
    return f"{_PREFIX}{step}-{max(there) + 1}" if there else f"{_PREFIX}{step}"


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
