"""The benchmark beside TRL: both sides take the same steps, and the rows count what they say."""

import itertools
import json
import threading

import pytest
from typer.testing import CliRunner

from katcore.bench import update
from katcore.cli import app
from katcore.train.rival import Side


@pytest.mark.slow
def test_both_sides_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are compared at each of two steps, so the first update is the same, too."""
    chosen = {"uneven": update.uneven, "dropped reasoning": update.dropped}
    monkeypatch.setattr(update, "_ROLLOUTS", chosen)
    options = "bench train --tokens 1024 --hidden 64 --layers 1 --rounds 2 --json"
    result = CliRunner().invoke(app, options.split())
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    found = [(row["objective"], row["rollouts"]) for row in rows]
    assert found == list(itertools.product(["sft", "grpo"], chosen))
    for row in rows:
        assert row["apart"] < 1e-5
        assert row["ratio"] == pytest.approx(row["ours_per_s"] / row["trl_per_s"])
        sharing = 1 if row["rollouts"] == "uneven" else 1 / 0.3
        assert row["sharing"] == pytest.approx(sharing, rel=0.1)
    assert not [one for one in threading.enumerate() if "telemetry" in one.name]


def test_steps_that_differ_are_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Side([1.0], [2.5]), Side([1.0], [2.4])
    monkeypatch.setitem(update._OBJECTIVES, "sft", lambda *_: sides)
    options = "bench train --tokens 1024 --hidden 64 --layers 1 --rounds 1"
    result = CliRunner().invoke(app, options.split())
    assert result.exit_code == 2
    assert "sft, equal: the losses of TRL's steps and of ours are not the same" in result.output
