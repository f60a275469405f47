"""Stages of a run take turns on a machine's GPUs."""

import threading
from pathlib import Path

import pytest

from katcore.config import load_preset
from katcore.pipeline.gpus import alone, has_gpus

GPU8 = load_preset("gpu8")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))


def test_which_stages_need_gpus() -> None:
    stages = (
        "base",
        "synthesize",
        "collect",
        "sft",
        "rl",
        "distill",
        "evaluate",
        "gate",
        "register",
    )
    assert [one for one in stages if has_gpus(GPU8, one)] == ["sft", "rl", "distill", "evaluate"]
    assert not any(has_gpus(load_preset("nano"), one) for one in stages)
    on_cpu = GPU8.model_copy(update={"scale": load_preset("nano").scale})
    assert [one for one in stages if has_gpus(on_cpu, one)] == ["rl", "distill", "evaluate"]
    elsewhere = on_cpu.model_copy(update={"serve": load_preset("cluster").serve})
    assert [one for one in stages if has_gpus(elsewhere, one)] == ["rl", "distill", "evaluate"]


def test_the_second_waits_for_the_first() -> None:
    order: list[str] = []
    waits = threading.Event()

    def said(line: str) -> None:
        order.append(line)
        waits.set()

    def second() -> None:
        with alone(GPU8, "evaluate", said):
            order.append("second")

    thread = threading.Thread(target=second)
    with alone(GPU8, "rl", order.append):
        thread.start()
        assert waits.wait(10)
        with alone(GPU8, "collect", order.append):
            order.append("first ends")
    thread.join(10)
    assert order == ["evaluate waits for the stage that has the GPUs", "first ends", "second"]


def test_processes_that_train_together_do_not_wait_for_who_started_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def environment(rank: str, meet_at: str) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", "8"), ("KATCORE_MEET_AT", meet_at)):
            monkeypatch.setenv(name, value)

    with alone(GPU8, "sft", pytest.fail):
        environment("0", "store")
        with alone(GPU8, "sft", pytest.fail):
            pass
    environment("0", "")
    with alone(GPU8, "sft", pytest.fail):  # torchrun's: the first has them for all
        environment("5", "")
        with alone(GPU8, "sft", pytest.fail):
            pass
