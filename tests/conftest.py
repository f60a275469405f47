"""Property tests have no deadline: how long an example takes says nothing on a shared machine."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

NOT_RUN = "not run"
"""How the reason of a skip begins that a machine lacks something for; said again in the run's last lines."""

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

_HERE = Path(__file__).parent
_MACHINES = {"kat_sandboxes", "rollout", "sandbox", "scaffold", "verifier"}
"""Folders of tests that mostly wait for machines. With two workers one does these, the other all else."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Makes two groups, before xdist looks for them. What starts vLLM has to be asked for: it needs an
    environment of its own.
    """
    for item in items:
        folder = item.path.relative_to(_HERE).parts[0]
        item.add_marker(pytest.mark.xdist_group("machines" if folder in _MACHINES else "rest"))
    if os.environ.get("KATCORE_VLLM_PYTHON"):
        return
    unasked = [item for item in items if item.get_closest_marker("vllm")]
    config.hook.pytest_deselected(items=unasked)
    items[:] = [item for item in items if item not in unasked]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A check that could not be made here is no check that passed."""
    skipped: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        reason = str(report.longrepr[-1]).removeprefix("Skipped: ")
        if reason.startswith(NOT_RUN):
            skipped[reason] += 1
    for reason, num in skipped.items():
        terminalreporter.write_line(f"{num} checks {reason}", yellow=True, bold=True)
