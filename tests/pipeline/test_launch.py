"""`scale.processes`: one command trains in several processes, and all end with one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from katcore.errors import ConfigError, StageError
from katcore.pipeline import launch
from katcore.settings import ScaleSettings
from tests.pipeline.test_training import RL, RL_STEPS, SFT, curve, folder, written

__all__ = ["folder"]


def command(verb: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "katcore.cli", verb, str(path)]


def trained(
    folder: Path, verb: str, config: dict[str, Any], scale: dict[str, Any]
) -> tuple[str, list[dict[str, float]]]:
    """What the command printed, and its curve."""
    path = written(folder, f"{verb}{config['out'][2:]}", config | {"scale": scale})
    done = subprocess.run(command(verb, path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, curve(folder / config["out"])


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_a_training_in_two_processes_is_that_of_one(folder: Path) -> None:
    config = SFT | {"sft": {"steps": 3, "batch": 5}, "lora": {"rank": 2}}
    _, one = trained(folder, "sft", config | {"out": "m/one"}, {})
    printed, two = trained(folder, "sft", config | {"out": "m/two"}, {"processes": 2})
    assert printed.split() == [str(folder / "m" / "two" / "model")]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    adapter = folder / "m" / "two" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_bytes())["r"] == 2


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_killing_one_ends_all_and_the_same_command_goes_on(folder: Path) -> None:
    """With weights that neither has: steps since the last checkpoint are taken again, and are the same."""
    steps = RL_STEPS | {"steps": 5, "checkpoint_every": 3, "kl": 0.1}
    path = written(folder, "rl", RL | {"rl": steps, "scale": {"processes": 2, "zero": 3}})
    process = subprocess.Popen(
        command("rl", path), stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE
    )
    growing = folder / "m" / "rl.work" / "out"
    while not (growing / "curve.jsonl").exists() or len(curve(growing)) < 4:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 2
    assert "process 1 of 2 was killed by signal 9; the others were ended" in said.replace("\n", " ")
    psutil.wait_procs(ranks, timeout=10)
    assert not any(rank.is_running() for rank in ranks)
    again = subprocess.run(command("rl", path), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    losses: dict[float, list[float]] = {}
    for row in curve(folder / "m" / "rl"):
        losses.setdefault(row["step"], []).append(row["loss"])
    assert list(losses) == [0, 1, 2, 3, 4]
    assert len(losses[3]) == 2
    assert all(len(set(found)) == 1 for found in losses.values())


def test_who_starts_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not launch.is_needed(ScaleSettings())
    assert launch.is_needed(ScaleSettings(processes=2))
    assert launch.is_needed(ScaleSettings(zero=1))
    with pytest.raises(ConfigError, match="torchrun --nnodes 2 --nproc-per-node 4"):
        launch.is_needed(ScaleSettings(processes=4, nodes=2))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not launch.is_needed(ScaleSettings(processes=4, nodes=2))
    with pytest.raises(ConfigError, match="8 processes were started"):
        launch.is_needed(ScaleSettings())


def test_an_error_in_a_process_is_one_of_the_command() -> None:
    with pytest.raises(StageError, match=r"process [01] of 2 exited with 2"):
        launch.launch(["sft", "/nonexistent.yaml"], ScaleSettings(processes=2))
