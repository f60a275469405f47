from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from katcore.config import Preset
from katcore.errors import StageError
from katcore.pipeline.local import log_path
from katcore.pipeline.plan import Plan, StageSpec
from katcore.service import drive, http

PLAN = Plan(
    Preset(name="any", summary=""),
    0,
    ("terminal",),
    {name: StageSpec(name, name.rpartition(".")[2]) for name in ("base", "terminal.sft")},
    {"base": "0", "terminal.sft": "1"},
)


class FakeAirflow:
    """Answers with one state after the other; an exception among them is raised."""

    def __init__(self, answers: Iterable[tuple[str, Mapping[str, str]] | Exception]) -> None:
        self._answers = list(answers)
        self._tasks: Mapping[str, str] = {}
        self.cancelled: list[str] = []

    def state(self, *_: str) -> str:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        self._tasks = answer[1]
        return answer[0]

    def tasks(self, *_: str) -> Mapping[str, str]:
        return self._tasks

    def cancel(self, _dag: str, run_id: str) -> None:
        self.cancelled.append(run_id)


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    monkeypatch.setattr(drive, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(drive, "_TICK_S", 0.0)


def follow(*answers: Any) -> list[str]:
    said: list[str] = []
    drive._follow(FakeAirflow(answers), "run-1", PLAN, lambda _: None, said.append)  # type: ignore[arg-type]
    return said


def log(stage: str, text: str) -> None:
    path = Path(log_path(PLAN, stage))
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_a_run_is_followed_to_its_end() -> None:
    lost = http.UnreachableError("restarting")
    assert follow(("queued", {}), lost, ("running", {"base": "running"}), ("success", {})) == []


def test_a_failed_stage_is_named_with_its_last_words_and_its_log() -> None:
    log("terminal.sft", "loading\nerror: the disk is full\n")
    with pytest.raises(StageError) as caught:
        follow(("running", {"base": "success", "terminal.sft": "failed"}))
    assert "stage terminal.sft failed: loading\nerror: the disk is full" in str(caught.value)
    assert log_path(PLAN, "terminal.sft") in str(caught.value)


def test_a_second_try_is_told_once() -> None:
    log("base", "error: a flicker\n")
    retry = ("running", {"base": "up_for_retry"})
    assert follow(retry, retry, ("success", {})) == [
        "base failed once and is tried again: error: a flicker"
    ]


def test_a_run_that_was_cancelled_in_the_ui() -> None:
    with pytest.raises(StageError, match="ended by somebody else"):
        follow(("failed", {"base": "skipped"}))


def test_a_preset_file_reaches_airflow_with_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert drive._preset("nano") == {"preset": "nano"}
    assert drive._preset("mine.yaml") == {"preset_file": str(tmp_path / "mine.yaml")}


def test_cancelling_survives_an_airflow_that_is_gone() -> None:
    class Gone(FakeAirflow):
        def cancel(self, _dag: str, run_id: str) -> None:
            raise http.UnreachableError(run_id)

    drive._cancel(Gone([]), "run-1")  # type: ignore[arg-type]


def test_a_stage_that_never_began_says_where_to_look() -> None:
    with pytest.raises(StageError, match=r"could not be started by Airflow; see .*scheduler\.log"):
        follow(("running", {"base": "failed"}))
