"""Inference engines for the proxy."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import Engine


@hookimpl
def katcore_engines() -> Iterable[Offer[Any, Engine]]:
    """A model in this process, on a vLLM server, or somebody else's by its API; and a script."""
    from kat_engines import config

    summary = "a Hugging Face folder, sampled in this process"
    yield Offer("transformers", config.TransformersConfig, config.make_transformers, summary)
    summary = "a vLLM server, started here or running elsewhere"
    yield Offer("vllm", config.VllmConfig, config.make_vllm, summary)
    summary = "any API of OpenAI's or Anthropic's kind"
    yield Offer("upstream", config.UpstreamConfig, config.make_upstream, summary)
    yield Offer("scripted", config.ScriptedConfig, config.make_scripted, "says what it is told")
