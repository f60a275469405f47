"""`kat proxy`: the proxy without sandbox and tasks, for agents that are started by hand."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from katcore.config import Settings, load_yaml
from katcore.pipeline.collection import BudgetSettings, Choice, SamplingSettings
from katcore.plugin import Plugins
from katcore.protocols import Engine, SupportsClose, SupportsOpen
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, SessionSpec
from katcore.schema.call import Sampling

_FOREVER = BudgetSettings(max_calls=1 << 30, max_tokens=1 << 40, seconds=1e9)


class ProxyConfig(Settings):
    """The engine behind the proxy, how it draws, and what may be spent; by default there is no end to it."""

    engine: Choice
    model: str = "policy"
    sampling: SamplingSettings = SamplingSettings()
    budget: BudgetSettings = _FOREVER
    is_training: bool = True


async def serve(path: Path, port: int, log: Path, report: Callable[[str], None]) -> None:
    """Serve until it is cancelled.

    Raises:
        ConfigError: the config does not fit.
        EngineError: the engine cannot be used.
        ProxyError: the port is taken.
    """
    config = load_yaml(path, ProxyConfig)
    engine: Engine = Plugins.installed().make("engine", config.engine.name, config.engine.options)
    try:
        if isinstance(engine, SupportsOpen):
            await engine.open(report)
        async with Proxy(log, port=port) as proxy:
            spec = SessionSpec(
                "alone",
                engine,
                Sampling(**config.sampling.model_dump()),
                Budget(**config.budget.model_dump()),
                config.model,
                config.is_training,
            )
            _, endpoint = proxy.open(spec)
            report(f"base URL {endpoint.base_url} (OpenAI's clients want {endpoint.base_url}/v1)")
            report(f"API key  {endpoint.api_key}")
            report(f"model    {endpoint.model}; calls go to {log}")
            await asyncio.Event().wait()
    finally:
        if isinstance(engine, SupportsClose):
            await engine.close()
