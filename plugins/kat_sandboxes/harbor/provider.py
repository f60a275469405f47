"""What is used of the `harbor` package (0.25): its factory of environments, and the records that it takes.

It needs Python 3.12, so that nothing here is imported where katcore's own tests run.
"""

import importlib
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from kat_sandboxes import capacity
from kat_sandboxes.harbor.config import HarborConfig
from katcore.errors import ConfigError, SandboxUnavailableError
from katcore.schema.task import SandboxSpec


class Output(Protocol):
    """What a command of an environment gives."""

    stdout: str | None
    stderr: str | None
    return_code: int


class Environment(Protocol):
    """The part of `harbor.environments.base.BaseEnvironment` that sandboxes need."""

    async def start(self, force_build: bool) -> None:  # noqa: FBT001
        """Build and start it."""

    async def stop(self, delete: bool) -> None:  # noqa: FBT001
        """End it."""

    async def exec(self, command: str, *, timeout_sec: int | None = None) -> Output:
        """Run a shell command."""

    async def upload_file(self, source_path: Path, target_path: str) -> None:
        """Copy a file into it."""

    async def download_file(self, source_path: str, target_path: Path) -> None:
        """Copy a file out of it."""


class Environments(Protocol):
    """Makes environments, not started."""

    def make(self, spec: SandboxSpec, session: str) -> Environment:
        """One environment. Raises SandboxUnavailableError, ConfigError."""

    def close(self) -> None:
        """Remove what they left on this machine."""


def environments(config: HarborConfig) -> Environments:
    """Those of a provider."""
    return _Harbor(config)


class _Harbor:
    def __init__(self, config: HarborConfig) -> None:
        self._config = config
        self._types: Any = importlib.import_module("harbor.models.environment_type")
        self._task: Any = importlib.import_module("harbor.models.task.config")
        self._paths: Any = importlib.import_module("harbor.models.trial.paths")
        self._factory: Any = importlib.import_module("harbor.environments.factory")
        self._folder = Path(tempfile.mkdtemp(prefix="katcore-harbor-"))

    def make(self, spec: SandboxSpec, session: str) -> Environment:
        """See `Environments.make`."""
        try:
            kind = self._types.EnvironmentType(self._config.provider)
        except ValueError as error:
            known = ", ".join(item.value for item in self._types.EnvironmentType)
            raise ConfigError(
                f"harbor has no provider {self._config.provider!r}; the option `provider` is one of: {known}"
            ) from error
        modes = self._task.NetworkMode
        mode = modes.PUBLIC if self._config.has_network else modes.NO_NETWORK
        cpus = capacity.cores(spec, self._config.cpus)
        wanted = self._task.EnvironmentConfig(
            memory_mb=spec.memory_mib, storage_mb=spec.disk_mib, cpus=cpus or None
        )
        try:
            made: Environment = self._factory.EnvironmentFactory.create_environment(
                type=kind,
                environment_dir=spec.environment,
                environment_name=spec.environment.parent.name or "katcore",
                session_id=session,
                trial_paths=self._paths.TrialPaths(trial_dir=self._folder / session),
                task_env_config=wanted,
                network_policy=self._task.NetworkPolicy(network_mode=mode),
                **self._config.options,
            )
        except (ImportError, ValueError, TypeError) as error:
            raise SandboxUnavailableError(f"harbor's {self._config.provider}: {error}") from error
        return made

    def close(self) -> None:
        """See `Environments.close`."""
        shutil.rmtree(self._folder, ignore_errors=True)
