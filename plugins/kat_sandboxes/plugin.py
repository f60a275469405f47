"""Sandbox backends."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import SandboxBackend


@hookimpl
def katcore_sandboxes() -> Iterable[Offer[Any, SandboxBackend]]:
    """The local backend."""
    from kat_sandboxes.local import LocalBackend, LocalConfig

    summary = "Linux namespaces on this machine; no daemon"
    yield Offer("local", LocalConfig, LocalBackend, summary)
