"""Coding agents."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Scaffold


@hookimpl
def katcore_scaffolds() -> Iterable[Offer[Any, Scaffold]]:
    """Our own small loop, released coding agents, and any other command."""
    from kat_scaffolds.recipe import RECIPES, AgentConfig, recipe
    from katcore.scaffold.command import CommandConfig, CommandScaffold
    from katcore.scaffold.mini import MiniConfig, MiniScaffold

    def make(name: str, config: AgentConfig) -> Scaffold:
        return CommandScaffold(recipe(name, config), name)

    yield Offer("mini", MiniConfig, MiniScaffold, "a bash loop: one answer, one command")
    yield Offer("command", CommandConfig, CommandScaffold, "any agent that is a command line")
    for name, (_, summary) in RECIPES.items():
        yield Offer(name, AgentConfig, partial(make, name), summary)
