"""The simulated fleet: none lost, no node above its limit, and the same run each time."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from katcore.bench import fleet
from katcore.bench.fleet import Settings
from katcore.cli import app

SMALL = Settings(sandboxes=400, nodes=10, lost=2, group=4)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> fleet.Report:
    return fleet.run(SMALL, tmp_path_factory.mktemp("fleet"))


def test_all_get_done_though_nodes_are_lost(report: fleet.Report) -> None:
    assert (report.done, report.given_up) == (400, 0)
    assert report.evicted > 0
    assert report.failures["EvictedError"] == report.evicted
    assert 0 < report.recovery.p50 <= report.recovery.most


def test_it_is_full_but_no_node_has_more_than_it_may(report: fleet.Report) -> None:
    assert report.is_sound
    assert report.most_of_a_node == 1.0
    assert 160 <= report.most_open <= 200


def test_a_task_s_sandboxes_run_together_and_none_waits_longer_than_all(
    report: fleet.Report,
) -> None:
    assert report.group_span.p50 < report.group_wait.p50
    assert report.wait.most < report.virtual_s


def test_the_ledger_has_a_row_for_each_and_is_empty_in_the_end(report: fleet.Report) -> None:
    starts = report.done + sum(report.failures.values())
    assert report.ledger.rows >= starts
    assert 0 < report.ledger.transactions < 2 * starts
    assert report.scheduling_us > 0


def test_the_same_seed_is_the_same_run(report: fleet.Report, tmp_path: Path) -> None:
    again = fleet.run(SMALL, tmp_path)
    assert again.failures == report.failures
    assert (again.wait, again.group_wait, again.recovery, again.virtual_s) == (
        report.wait,
        report.group_wait,
        report.recovery,
        report.virtual_s,
    )
    assert fleet.run(replace(SMALL, seed=1), tmp_path).wait != report.wait
    assert list(tmp_path.iterdir()) == []


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    run = CliRunner().invoke(
        app, ["bench", "fleet", "--sandboxes", "40", "--nodes", "4", "--lost", "1"]
    )
    assert run.exit_code == 0, run.output
    assert "from the loss of a node to running again" in run.output
    run = CliRunner().invoke(app, ["bench", "fleet", "--nodes", "4", "--lost", "4"])
    assert run.exit_code != 0
    assert "has to stay" in run.output
