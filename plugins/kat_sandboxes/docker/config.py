"""Options of the docker backend, and how it is made: its SDK is imported only then."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from katcore.protocols import SandboxBackend


class DockerConfig(BaseModel):
    """Options of the docker backend.

    `url` is the engine's address, by default `$DOCKER_HOST` or Docker's own socket. `runtime` is the engine's
    OCI runtime, by default its default. `cpus` bounds the cores of one sandbox (0: no bound). `network` is
    what RUN in a Dockerfile has: `default` the engine's, `none` nothing; sandboxes never have one. `images`
    is where the local backend's image store is, by default in katcore's home.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = ""
    runtime: str = ""
    cpus: float = Field(default=0.0, ge=0)
    network: str = "default"
    images: Path | None = None


def make_docker(config: DockerConfig) -> SandboxBackend:
    """A backend; the engine is not asked before the first sandbox."""
    from kat_sandboxes.docker.backend import DockerBackend  # noqa: PLC0415

    return DockerBackend(config)
