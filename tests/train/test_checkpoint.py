"""A checkpoint is there whole, or the one before it is, wherever the process that writes it ends."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from katcore.train import checkpoint

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.train.test_checkpoint"])
_CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
End = Literal["killed", "failed"]


def write(path: Path, step: int, value: int) -> None:
    whole = {"scale": {}, "step": step, "value": value, "weights": torch.full((300,), value)}
    checkpoint.write(path, step, whole, {"value": value})


def ends_at(number: int, root: Path, end: End) -> Callable[[str, tuple[Any, ...]], None]:
    """Ends the process at its `number`th operation on files below `root`, before it is done."""
    left = [number]

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in _CHANGES and root.name in os.fsdecode(_path(details[0])):
            left[0] -= 1
            if left[0] < 0:
                if end == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(28, "No space left on device")

    return hook


def _path(given: Any) -> Any:
    return given if isinstance(given, str | bytes | os.PathLike) else ""


def writes(path: Path, step: int, number: int, end: End) -> None:
    sys.addaudithook(ends_at(number, path, end))
    try:
        write(path, step, 2)
    except OSError:
        sys.exit(1)


@pytest.mark.parametrize("step", [7, 8], ids=["the same step", "a later one"])
@pytest.mark.parametrize("end", ["killed", "failed"])
def test_the_last_or_the_one_before_is_whole_wherever_writing_ends(
    tmp_path: Path, step: int, end: End
) -> None:
    seen = []
    for number in range(100):
        path = tmp_path / f"checkpoint-{number}"
        for _ in range(2):
            write(path, 7, 1)
        process = FORKS.Process(target=writes, args=(path, step, number, end))
        process.start()
        process.join(60)
        seen.append(process.exitcode)
        found = checkpoint.read(path)
        assert found
        whole, own = found
        assert whole["value"] == own["value"]
        assert torch.equal(whole["weights"], torch.full((300,), whole["value"]))
        assert process.exitcode or whole["value"] == 2
        # And the next one is the last.
        write(path, 8, 3)
        (left,) = path.iterdir()
        assert torch.load(left / "trainer.pt")["value"] == 3
        if not process.exitcode:
            break
    assert seen[-1] == 0
    # Making the folder, two files and the rename, at least; deleting may fail unseen.
    assert seen[:4] == [-signal.SIGKILL if end == "killed" else 1] * 4
