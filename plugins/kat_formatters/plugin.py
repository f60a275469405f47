"""What tasks come from, how they are judged, and how rollouts become samples: the built-in ways."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Dataset, Formatter, Verifier


@hookimpl
def katcore_datasets() -> Iterable[Offer[Any, Dataset]]:
    """Task directories in Harbor's format."""
    from katcore.dataset.harbor import HarborConfig, HarborDataset

    yield Offer("harbor", HarborConfig, HarborDataset, "a folder of Harbor task directories")


@hookimpl
def katcore_verifiers() -> Iterable[Offer[Any, Verifier]]:
    """The task's own test script."""
    from katcore.verifier.state import TestScriptConfig, TestScriptVerifier

    summary = "tests/test.sh judges the final state in a fresh sandbox"
    yield Offer("test-script", TestScriptConfig, TestScriptVerifier, summary)


@hookimpl
def katcore_formatters() -> Iterable[Offer[Any, Formatter]]:
    """Token trees."""
    from katcore.trajectory.formats import TreeConfig, TreeFormatter

    yield Offer("tree", TreeConfig, TreeFormatter, "one token tree per scored rollout")
