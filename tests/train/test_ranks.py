"""Two processes take the steps that one takes, whatever each has to compute; and they go on the same."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

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


def steps(out: Path, num: int, until: int = 3, **settings: Any) -> dict[str, Any]:
    """What `num` processes come to."""
    out.mkdir(exist_ok=True)
    processes = [
        FORKS.Process(target=work, args=(rank, num, out, settings, until)) for rank in range(num)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(250)
        assert [process.exitcode for process in processes] == [0] * num
    finally:
        for process in processes:
            process.kill()
    found: dict[str, Any] = json.loads((out / "result.json").read_bytes())
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to, in float64."""
    return steps(tmp_path_factory.mktemp("one"), 1)


def test_two_processes_take_the_steps_of_one(tmp_path: Path, one: dict[str, Any]) -> None:
    """The first has a tree in five parts, the other lines in one pass."""
    two = steps(tmp_path, 2)
    for mine, other in zip(two["curve"], one["curve"], strict=True):
        assert mine == pytest.approx(other, rel=1e-10)
    assert two["logprobs"] == pytest.approx(one["logprobs"], rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ZERO.values(), ids=ZERO)
def test_sharded_steps_are_those_of_one_process(
    tmp_path: Path, one: dict[str, Any], settings: dict[str, Any]
) -> None:
    for num in (1, 2):
        found = steps(tmp_path / str(num), num, **settings)
        for mine, other in zip(found["curve"], one["curve"], strict=True):
            assert mine == pytest.approx(other, rel=1e-4)
        assert found["logprobs"] == pytest.approx(one["logprobs"], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"zero": 2}], ids=["whole", "zero 2"])
def test_two_processes_go_on_as_if_they_had_not_been_stopped(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = steps(tmp_path / "whole", 2, **settings)
    steps(tmp_path / "cut", 2, until=2, **settings)
    rest = steps(tmp_path / "cut", 2, **settings)
    assert rest["curve"] == whole["curve"][2:]
    assert rest["logprobs"] == whole["logprobs"]


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
