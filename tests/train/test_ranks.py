"""Two processes take the steps that one takes, whatever each has to compute; and they go on the same."""

import json
import math
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from katcore.errors import StageError
from katcore.train import checkpoint
from katcore.train.ranks import spread
from tests.train.spread_worker import samples, work
from tests.train.trees import line

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.train.spread_worker"])
ZERO = {
    "zero 1": {"zero": 1},
    "zero 2": {"zero": 2},
    "zero 1 offloaded": {"zero": 1, "offload": "optimizer"},
}


def ended(out: Path, num: int, until: int = 3, **settings: Any) -> list[int | None]:
    """How each of `num` processes ends."""
    out.mkdir(exist_ok=True)
    processes = [
        FORKS.Process(target=work, args=(rank, num, out, settings, until)) for rank in range(num)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(250)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def steps(out: Path, num: int, until: int = 3, **settings: Any) -> dict[str, Any]:
    """What `num` processes come to."""
    assert ended(out, num, until, **settings) == [0] * num
    found: dict[str, Any] = json.loads((out / "result.json").read_bytes())
    return found | {"weights": load_file(out / "model" / "model.safetensors")}


def is_same(found: dict[str, Any], wanted: dict[str, Any], rel: float = 1e-10) -> None:
    """Of two trainings, the metrics of each step, log-probabilities, and the model written."""
    for mine, other in zip(found["curve"], wanted["curve"], strict=True):
        assert mine == pytest.approx(other, rel=rel)
    assert found["logprobs"] == pytest.approx(wanted["logprobs"], rel=rel)
    assert found["handed_over"] == pytest.approx(wanted["handed_over"], rel=rel, abs=100 * rel)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        if rel > 1e-6 and name.endswith("k_proj.bias"):
            continue  # it adds the same to all scores: AdamW makes large what is rounding alone
        torch.testing.assert_close(found["weights"][name].double(), weight, rtol=rel, atol=10 * rel)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to, in float64."""
    return steps(tmp_path_factory.mktemp("one"), 1)


def test_two_processes_take_the_steps_of_one(tmp_path: Path, one: dict[str, Any]) -> None:
    """The first has a tree in five parts, the other lines in one pass."""
    is_same(steps(tmp_path, 2), one)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ZERO.values(), ids=ZERO)
def test_sharded_steps_are_those_of_one_process(
    tmp_path: Path, one: dict[str, Any], settings: dict[str, Any]
) -> None:
    for num in (1, 2):
        is_same(steps(tmp_path / str(num), num, **settings), one, rel=1e-4)


def test_scattered_weights_take_the_same_steps(tmp_path: Path, one: dict[str, Any]) -> None:
    """The first process has a tree in five parts, one within the other, beside one pass or none."""
    for num in (2, 3):
        found = steps(tmp_path / str(num), num, zero=3)
        is_same(found, one)
        assert len(set(found["passes"])) == 1
    apart = steps(tmp_path / "apart", 2)
    assert len(set(apart["passes"])) == 2, "without need, none is made for nothing"


@pytest.mark.parametrize("objective", ["rl", "distill"])
def test_scattered_models_keep_pace_whatever_is_learnt(tmp_path: Path, objective: str) -> None:
    """What is looked at besides the trained model is scattered, too: a reference, and two teachers."""
    one = steps(tmp_path / "one", 1, until=2, objective=objective)
    for num in (1, 2, 3):
        found = steps(tmp_path / f"{num}", num, until=2, objective=objective, zero=3)
        is_same(found, one)
        assert len(set(found["passes"])) == 1


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_what_is_offloaded_takes_the_same_steps(
    tmp_path: Path, one: dict[str, Any], offload: str
) -> None:
    is_same(steps(tmp_path, 2, zero=3, offload=offload), one)


@pytest.mark.parametrize("objective", ["rl", "distill"])
def test_after_the_kill_of_a_process_the_losses_are_those_that_would_have_been(
    tmp_path: Path, objective: str
) -> None:
    settings = {"objective": objective, "zero": 3, "offload": "optimizer", "adapters": 2}
    whole = steps(tmp_path / "whole", 2, **settings)
    first, last = ended(tmp_path / "cut", 2, killed=2, **settings)
    assert (first, last) == (1, -signal.SIGKILL)
    rest = steps(tmp_path / "cut", 2, **settings)
    assert rest["curve"] == whole["curve"][1:]
    assert rest["logprobs"] == whole["logprobs"]


def test_adapters_of_scattered_weights_are_those_of_whole_ones(tmp_path: Path) -> None:
    whole, scattered = tmp_path / "whole", tmp_path / "scattered"
    is_same(steps(scattered, 2, adapters=2, zero=3), steps(whole, 1, adapters=2))
    written = [load_file(out / "adapter/adapter_model.safetensors") for out in (whole, scattered)]
    assert written[0].keys() == written[1].keys()
    for name, weight in written[0].items():
        torch.testing.assert_close(written[1][name], weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "settings", [{}, {"zero": 2}, {"zero": 3}], ids=["whole", "zero 2", "zero 3"]
)
def test_two_processes_go_on_as_if_they_had_not_been_stopped(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = steps(tmp_path / "whole", 2, **settings)
    steps(tmp_path / "cut", 2, until=2, **settings)
    rest = steps(tmp_path / "cut", 2, **settings)
    assert rest["curve"] == whole["curve"][2:]
    assert rest["logprobs"] == whole["logprobs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, *ZERO.values(), {"zero": 3, "offload": "optimizer"}], ids=str
)
def test_all_skip_what_is_not_finite_in_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    """And go on from there as if that update had not been."""
    found = steps(tmp_path, 2, **settings, broken=1)
    assert [row["skipped"] for row in found["curve"]] == [0.0, 1.0, 0.0]
    assert "loss" not in found["curve"][1]
    before, _, after = found["curve"]
    assert after["loss"] < before["loss"]
    assert math.isfinite(after["grad_norm"])


def test_another_scale_does_not_go_on(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 3, {"scale": {"processes": 1, "zero": 0}}, {})
    assert checkpoint.read(tmp_path, processes=1, zero=0)
    with pytest.raises(StageError, match="set `scale` as it was"):
        checkpoint.read(tmp_path, processes=2, zero=0)


def test_what_was_not_written_whole_is_no_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint.write(tmp_path, step, {"scale": {}, "step": step}, {"rank": 0})
    assert [found.name for found in tmp_path.iterdir()] == ["step-10"]
    (tmp_path / "growing-11").mkdir()
    found = checkpoint.read(tmp_path)
    assert found
    assert found[0]["step"] == 10


def test_trees_are_spread_by_what_they_cost() -> None:
    rows = [line([1] * num, [False] + [True] * (num - 1)) for num in (40, 10, 12, 11, 9)]
    parts = spread(rows, 2, width=64)
    assert parts == [[0], [1, 2, 3, 4]]
    assert spread(rows[:1], 2, width=64) == [[0], []]
    assert sorted(at for part in spread(samples(), 3, width=16) for at in part) == list(range(5))
