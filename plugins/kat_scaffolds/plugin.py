"""Coding agents."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Scaffold


@hookimpl
def katcore_scaffolds() -> Iterable[Offer[Any, Scaffold]]:
    """The mini scaffold."""
    from katcore.scaffold.mini import MiniConfig, MiniScaffold

    yield Offer("mini", MiniConfig, MiniScaffold, "a bash loop: one answer, one command")
