"""A sandbox whose commands know the way out."""

from collections.abc import Mapping, Sequence

from katcore.protocols import Sandbox
from katcore.schema.rollout import ExecResult

_OWN = "localhost,127.0.0.1"


class Reaching:
    """Sets the variables that programs read for the proxy to use; `url` is that of the door."""

    def __init__(self, sandbox: Sandbox, url: str) -> None:
        self._sandbox = sandbox
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        self._env = dict.fromkeys(names, url) | dict.fromkeys(("no_proxy", "NO_PROXY"), _OWN)

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> ExecResult:
        """See `Sandbox.exec`."""
        known = {**self._env, **(env or {})}
        return await self._sandbox.exec(argv, cwd=cwd, env=known, timeout_s=timeout_s)

    async def read(self, path: str) -> bytes:
        """See `Sandbox.read`."""
        return await self._sandbox.read(path)

    async def write(self, path: str, data: bytes) -> None:
        """See `Sandbox.write`."""
        await self._sandbox.write(path, data)
