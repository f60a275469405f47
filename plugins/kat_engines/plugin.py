"""Inference engines for the proxy."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Engine


@hookimpl
def katcore_engines() -> Iterable[Offer[Any, Engine]]:
    """A model in this process, somebody else's by its API, and a script."""
    from kat_engines import config

    summary = "a Hugging Face folder, sampled in this process"
    yield Offer("transformers", config.TransformersConfig, config.make_transformers, summary)
    summary = "any API of OpenAI's or Anthropic's kind"
    yield Offer("upstream", config.UpstreamConfig, config.make_upstream, summary)
    yield Offer("scripted", config.ScriptedConfig, config.make_scripted, "says what it is told")
