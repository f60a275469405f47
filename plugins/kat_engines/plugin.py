"""Inference engines for the proxy."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Engine


@hookimpl
def katcore_engines() -> Iterable[Offer[Any, Engine]]:
    """The embedded engine over a model folder."""
    from kat_engines.embedded import EmbeddedConfig, make_embedded

    summary = "a Hugging Face folder, sampled in this process"
    yield Offer("embedded", EmbeddedConfig, make_embedded, summary)
