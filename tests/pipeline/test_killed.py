"""kill -9 wherever a training is: on the same rollouts losses and model are those of one that was not."""

import multiprocessing
import os
import shutil
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from katcore.pipeline.trained import run
from katcore.pipeline.training import CONFIGS, load_training
from katcore.plugin import Plugins
from tests.pipeline.test_training import AGENT, AHEAD, DISTILL, RL, SFT, curve, folder, written

__all__ = ["folder"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.pipeline.test_killed"])
CONFIG: dict[str, dict[str, Any]] = {
    "sft": SFT | {"sft": {"steps": 7, "batch": 4, "checkpoint_every": 2}},
    "rl": RL | {"rl": {"steps": 5, "prompts": 2, "group": 2, "epochs": 2, "checkpoint_every": 2}},
    "distill": DISTILL
    | {
        "domains": {"shell": AGENT | {"teacher": "base", "rollouts": "demos.jsonl"}},
        "distill": {
            "cold_steps": 3,
            "cold_batch": 2,
            "steps": 4,
            "prompts": 2,
            "group": 2,
            "objective": "policy-gradient",
            "rewards": True,
            "checkpoint_every": 2,
        },
    },
}
_CHECKPOINT = "katcore.train.checkpoint"
_STEP = "katcore.pipeline.progress.Progress.step"
_UPDATE = "katcore.train.trainer.Trainer.update"
POINTS = [
    (_UPDATE, 2),
    (_STEP, 2),
    (f"{_CHECKPOINT}._save", 2),
    # A checkpoint has its name.
    (f"{_CHECKPOINT}._sync", 2),
    (_UPDATE, 1),
    # As has the next one, and the one before it is still there.
    (f"{_CHECKPOINT}._sync", 2),
    (_STEP, 1),
    ("katcore.train.trainer.Trainer.publish", 1),
]
"""Functions, and the call of each that is not begun. The training goes on from one to the next."""


def kill_at(point: str, number: int) -> None:
    """This process, instead of that call."""
    module, _, name = point.rpartition(".")
    try:
        home: Any = import_module(module)
    except ModuleNotFoundError:
        module, _, kind = module.rpartition(".")
        home = getattr(import_module(module), kind)
    call, left = getattr(home, name), [number]

    def counted(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*given, **named)

    setattr(home, name, counted)


def train(path: Path, verb: str, home: Path, point: str, number: int) -> None:
    os.environ["KATCORE_HOME"] = str(home)
    kill_at(point, number)
    run(path, load_training(path, CONFIGS[verb]), Plugins.installed())


def killed(*given: Any) -> bool:
    """Whether a training came to the point where it is."""
    process = FORKS.Process(target=train, args=given)
    process.start()
    process.join(200)
    process.kill()
    assert process.exitcode in {0, -signal.SIGKILL}
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.timeout(580)
@pytest.mark.parametrize(
    ("verb", "serve"), [("sft", {}), ("rl", {}), ("distill", {}), ("rl", AHEAD)], ids=str
)
def test_the_losses_are_those_that_would_have_been(
    folder: Path, verb: str, serve: dict[str, Any]
) -> None:
    def config(out: str) -> Path:
        return written(folder, out, CONFIG[verb] | serve | {"out": f"m/{out}"})

    whole = folder / "m" / "whole"
    path = config("whole")
    run(path, load_training(path, CONFIGS[verb]), Plugins.installed())
    wanted = {row["step"]: row["loss"] for row in curve(whole)}
    assert len(set(wanted.values())) == len(wanted) > 4
    path, out = config("cut"), folder / "m" / "cut"
    growing = Path(f"{out}.work") / "out"
    if verb != "sft":
        growing.mkdir(parents=True)
        shutil.copy(whole / "rollouts.jsonl", growing)
    for point, number in POINTS:
        assert killed(path, verb, folder / "home", point, number), (point, number)
        assert not out.exists()
    run(path, load_training(path, CONFIGS[verb]), Plugins.installed())
    found = curve(out)
    assert len(found) > len(wanted), "some steps were taken again"
    assert {row["step"] for row in found} == wanted.keys()
    for row in found:
        assert row["loss"] == wanted[row["step"]]
    model = "model/model.safetensors"
    assert (out / model).read_bytes() == (whole / model).read_bytes()
    if verb != "sft":
        rollouts = [(made / "rollouts.jsonl").read_bytes() for made in (out, whole)]
        assert rollouts[0] == rollouts[1], "none is made twice"
