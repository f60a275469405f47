"""A coding agent as a command line in the sandbox: what to install, run, set and write is data.

In all texts `${prompt}`, `${base_url}` (without /v1), `${api_key}`, `${model}`, `${context}` and `${output}`
stand for what the rollout says; any other `$` is left alone.
"""

from collections.abc import Callable, Mapping
from string import Template

from pydantic import BaseModel, ConfigDict, Field, model_validator

from katcore.config import home
from katcore.errors import SandboxTimeoutError, ScaffoldError
from katcore.protocols import Sandbox
from katcore.scaffold.install import install_npm, install_pypi
from katcore.schema.rollout import ExecResult, Installation, ModelEndpoint

HOME = "/tmp/home"
_BIN = "/opt/scaffold/node_modules/.bin"
_START = f'mkdir -p {HOME}; PATH="{_BIN}:$PATH" exec "$@"'
_SHOWN = 300


class CommandConfig(BaseModel):
    """Options of the command scaffold.

    `npm` or `pypi` are packages with their exact versions; the first is the agent. Those of npm are in the
    PATH; those of PyPI are run by `python3 /opt/scaffold/run.py MODULE`, with the image's Python 3.11.
    `files` are written before the start; their paths begin with / or ~ (a home that is no part of the task).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: tuple[str, ...] = Field(min_length=1)
    env: Mapping[str, str] = {}
    files: Mapping[str, str] = {}
    npm: Mapping[str, str] = {}
    pypi: Mapping[str, str] = {}
    timeout_s: float = Field(default=3600.0, gt=0)
    context: int = 131072
    output: int = 8192
    memory_mib: int = 3072
    max_processes: int = 512
    disk_mib: int = 2048

    @model_validator(mode="after")
    def _one_source(self) -> "CommandConfig":
        if self.npm and self.pypi:
            raise ValueError("an agent comes from npm or from pypi, not from both")
        return self


class CommandScaffold:
    """Runs the command until it ends by itself, or its time is up."""

    def __init__(self, config: CommandConfig, name: str = "command") -> None:
        self._config = config
        self._name = name

    async def install(self, report: Callable[[str], None]) -> Installation:
        """See `RunsInside.install`."""
        config = self._config
        tools, version = None, ""
        for packages, install in ((config.npm, install_npm), (config.pypi, install_pypi)):
            if packages:
                tools = await install(home() / "scaffolds", self._name, packages, report)
                version = next(iter(packages.values()))
        return Installation(
            version, tools, config.memory_mib, config.max_processes, config.disk_mib
        )

    async def run(self, prompt: str, sandbox: Sandbox, endpoint: ModelEndpoint) -> ExecResult:
        """See `Scaffold.run`. `stderr` is `exit 0`, `exit N: ...` with the end of what it said, or `time`.

        Raises:
            ScaffoldError: the sandbox has no door to the model.
        """
        if not endpoint.inside_url:
            raise ScaffoldError("it runs in the sandbox, and the sandbox has no door to the model")
        config = self._config
        known = {
            "prompt": prompt,
            "base_url": endpoint.inside_url,
            "api_key": endpoint.api_key,
            "model": endpoint.model,
            "context": str(config.context),
            "output": str(config.output),
        }

        def filled(text: str) -> str:
            return Template(text).safe_substitute(known)

        for path, text in config.files.items():
            await sandbox.write(path.replace("~", HOME, 1), filled(text).encode())
        env = {"HOME": HOME, **{name: filled(text) for name, text in config.env.items()}}
        command = ["bash", "-c", _START, self._name, *map(filled, config.command)]
        try:
            result = await sandbox.exec(command, env=env, timeout_s=config.timeout_s)
        except SandboxTimeoutError:
            return ExecResult(-1, b"", b"time")
        return ExecResult(result.exit_code, result.stdout, _reason(result), result.truncated)


def _reason(result: ExecResult) -> bytes:
    if not result.exit_code:
        return b"exit 0"
    said = (result.stdout + result.stderr).strip()[-_SHOWN:]
    return b"exit %d: %s" % (result.exit_code, said)
