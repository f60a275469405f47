"""No training ends because MLflow fails, and nothing is lost of its metrics."""

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from katcore.config import Preset
from katcore.pipeline import progress as module
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.progress import Progress
from katcore.registry.store import client, experiment_id

SPEC = StageSpec("swe.sft", "sft", "swe")
PLAN = Plan(Preset(name="p", summary=""), 0, ("swe",), {SPEC.id: SPEC}, {SPEC.id: "k"})


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "_TRACK_EVERY_S", -1.0)
    monkeypatch.setattr(module, "_PATIENCE", 0)
    (tmp_path / "work" / "out").mkdir(parents=True)
    return tmp_path / "work"


def tracked() -> list[tuple[int, float]]:
    """The losses that MLflow has."""
    (run,) = client().search_runs([experiment_id("expert/swe")])
    history = client().get_metric_history(run.info.run_id, "loss")
    return sorted((one.step, one.value) for one in history)


@contextmanager
def broken(work: Path) -> Iterator[None]:
    """MLflow's database while a table is missing."""
    database = sqlite3.connect(work.parent / "home" / "mlflow.db", isolation_level=None)
    database.execute("ALTER TABLE metrics RENAME TO gone")
    yield
    database.execute("ALTER TABLE gone RENAME TO metrics")
    database.close()


def test_metrics_are_sent_again_when_mlflow_is_back(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress(SPEC, work, PLAN)
    progress.step(0, 9, {"loss": 1.0})
    with broken(work):
        for step in (1, 2):
            progress.step(step, 9, {"loss": 1.0 - step / 10})
        assert caplog.text.count("MLflow does not take the metrics of swe.sft") == 1
    assert tracked() == [(0, 1.0)]
    progress.step(3, 9, {"loss": 0.7})
    assert tracked() == [(0, 1.0), (1, 0.9), (2, 0.8), (3, 0.7)]
    with broken(work):
        progress.step(4, 9, {"loss": 0.6})
        progress.close()
    assert caplog.text.count("MLflow does not take the metrics of swe.sft") == 2
    curve = [json.loads(line) for line in (work / "out" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curve] == [0, 1, 2, 3, 4]


def test_what_fails_slowly_is_left_alone_for_longer(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 1000)
    progress = Progress(SPEC, work, PLAN)
    progress.step(0, 9, {"loss": 1.0})
    with broken(work):
        progress.step(1, 9, {"loss": 0.9})
    progress.step(2, 9, {"loss": 0.8})
    assert tracked() == [(0, 1.0)]
    progress.close()
    assert tracked() == [(0, 1.0), (1, 0.9), (2, 0.8)]


def test_without_mlflow_from_the_beginning_a_training_is_as_well(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = work.parent / "home"
    home.write_text("no folder")
    progress = Progress(SPEC, work, PLAN)
    progress.step(0, 9, {"loss": 1.0})
    assert "MLflow does not take the metrics" in caplog.text
    home.unlink()
    progress.step(1, 9, {"loss": 0.9})
    progress.close()
    assert tracked() == [(0, 1.0), (1, 0.9)]


def test_trainer_and_engines_may_report_at_the_same_time(work: Path) -> None:
    progress = Progress(SPEC, work, PLAN)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(progress.say, str(number)) for number in range(2000)]:
            done.result()
    assert json.loads((work / "progress.json").read_bytes())["stage"] == "swe.sft"
