"""Every hook katcore calls. This page is the plugin API.

Two kinds, and only two. *Offers* are collected once, and a run picks from them by name.
*Observers* are told that something happened, and cannot change it.
"""

from collections.abc import Iterable
from typing import Any

import pluggy

from katcore.plugin.offer import Offer
from katcore.protocols import (
    Dataset,
    Engine,
    Formatter,
    SandboxBackend,
    Scaffold,
    Synthesizer,
    Verifier,
)
from katcore.schema.event import ModelRegistered, RolloutFinished, StageFinished
from katcore.schema.expert import Expert

hookspec = pluggy.HookspecMarker("katcore")
hookimpl = pluggy.HookimplMarker("katcore")


@hookspec
def katcore_datasets() -> Iterable[Offer[Any, Dataset]]:
    """Offer sources of tasks."""
    return ()


@hookspec
def katcore_synthesizers() -> Iterable[Offer[Any, Synthesizer]]:
    """Offer ways to make tasks."""
    return ()


@hookspec
def katcore_sandboxes() -> Iterable[Offer[Any, SandboxBackend]]:
    """Offer ways to open sandboxes."""
    return ()


@hookspec
def katcore_scaffolds() -> Iterable[Offer[Any, Scaffold]]:
    """Offer coding agents."""
    return ()


@hookspec
def katcore_engines() -> Iterable[Offer[Any, Engine]]:
    """Offer inference engines for the proxy."""
    return ()


@hookspec
def katcore_verifiers() -> Iterable[Offer[Any, Verifier]]:
    """Offer ways to judge a rollout."""
    return ()


@hookspec
def katcore_formatters() -> Iterable[Offer[Any, Formatter[Any]]]:
    """Offer ways to turn rollouts into training samples, or into rows for others."""
    return ()


@hookspec
def katcore_experts() -> Iterable[Expert]:
    """Offer expert domains: data only, built from the names of the offers above."""
    return ()


@hookspec
def katcore_rollout_finished(event: RolloutFinished) -> None:
    """Observe the end of one rollout. An error raised here is logged, and the run goes on."""


@hookspec
def katcore_stage_finished(event: StageFinished) -> None:
    """Observe the end of a stage. An error raised here is logged, and the run goes on."""


@hookspec
def katcore_model_registered(event: ModelRegistered) -> None:
    """Observe a new model version. An error raised here is logged, and the run goes on."""
