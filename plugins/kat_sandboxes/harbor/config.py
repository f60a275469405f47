"""Options of the harbor backend, and how it is made: the package is imported only then."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from katcore.errors import SandboxUnavailableError
from katcore.protocols import SandboxBackend


class HarborConfig(BaseModel):
    """Options of the harbor backend. A provider's credentials are in the environment variables that it names.

    `provider` is one of Harbor's environment types, such as `e2b`, `modal` or `daytona`. `options` are passed
    on to it. Sandboxes are denied the network; a provider that cannot do so is refused, unless
    `has_network: true` lets them have it. `cpus` is what a sandbox asks for (0: the provider's default). A
    sandbox has `start_s` to be built and started.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: str = ""
    options: dict[str, Any] = {}
    has_network: bool = False
    cpus: float = Field(default=0.0, ge=0)
    start_s: float = Field(default=900.0, gt=0)


def make_harbor(config: HarborConfig) -> SandboxBackend:
    """A backend; the provider is not asked before the first sandbox."""
    from kat_sandboxes.harbor.backend import HarborBackend  # noqa: PLC0415
    from kat_sandboxes.harbor.provider import environments  # noqa: PLC0415

    try:
        found = environments(config)
    except ImportError as error:
        raise SandboxUnavailableError(
            "the harbor backend needs Python 3.12 and the package harbor with all that it needs:"
            f" pip install 'katcore[harbor]' ({error})"
        ) from error
    return HarborBackend(found, config.start_s)
