"""A vLLM server of our own: started, watched, started again a few times, and ended with us.

It listens on loopback, with a key that only its environment and we know. `keeper` sees to it that nothing of
it outlives us.
"""

import asyncio
import importlib.util
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from katcore.config import environment, home
from katcore.errors import ConfigError, EngineError
from katcore.inference import keeper
from katcore.inference.vllm_http import Address

HOST = "127.0.0.1"
_MAX_RESTARTS = 3
_POLL_S = 0.5
_REPORT_S = 15.0
_HEALTH_S = 5.0
_MAX_LINES, _MAX_TAIL = 15, 8192
_OURS = ("--model", "--served-model-name", "--host", "--port", "--api-key", "--uds", "--config")
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank of adapters."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """What a server is started with. `arguments` are vLLM's own; they stand above ours.

    `takes_weights` and `sleeps` open endpoints for new weights and for sleep, which vLLM guards with no key;
    adapters of up to `adapter_rank` are taken by one that wants the key. `devices` are its GPUs, () all.

    Raises:
        ConfigError: an argument is one that we have to choose.
    """

    model: Path
    python: Path
    arguments: tuple[str, ...] = ()
    takes_weights: bool = False
    adapter_rank: int = 0
    sleeps: bool = False
    devices: tuple[int, ...] = ()
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for argument in self.arguments:
            if argument.partition("=")[0].replace("_", "-") in _OURS:
                raise ConfigError(
                    f"arguments: {argument.partition('=')[0]} is chosen by katcore, which starts vLLM on"
                    " loopback with a key; for a server of another kind, start it yourself and give its `url`"
                )

    def command(self, port: int) -> list[str]:
        """The command line."""
        return [
            *(str(self.python), "-m", "vllm.entrypoints.openai.api_server"),
            *(
                "--model",
                str(self.model.resolve()),
                "--served-model-name",
                self.model.resolve().name,
            ),
            *("--host", HOST, "--port", str(port)),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *self._abilities(),
            *self.arguments,
        ]

    def _abilities(self) -> list[str]:
        flags = ["--enable-sleep-mode"] if self.sleeps else []
        if self.adapter_rank:
            rank = next((rank for rank in _RANKS if rank >= self.adapter_rank), self.adapter_rank)
            flags += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2"]
        return flags

    def environment(self, key: str) -> dict[str, str]:
        """The environment; of another interpreter's, what would lead it to our packages is left out."""
        given = {"VLLM_HOST_IP": HOST, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        given = given | environment() | {"VLLM_API_KEY": key}
        if self.takes_weights or self.sleeps:
            given["VLLM_SERVER_DEV_MODE"] = "1"
        if self.adapter_rank:
            given["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        if self.devices:
            given["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.devices))
        if self.python != Path(sys.executable):
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
                given.pop(name, None)
        return given


def find_python(wanted: Path | None) -> Path:
    """The interpreter that has vLLM: `wanted`, or our own.

    Raises:
        ConfigError: it is none, or has no vLLM.
    """
    if wanted is None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "vLLM is not installed here: `pip install 'katcore[serve]'`; or, better, install it into an"
                " environment of its own and name the interpreter of that with `python`"
            )
        return Path(sys.executable)
    # Not resolved: an environment's interpreter is a link to another one.
    python = wanted.expanduser().absolute()
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([python, "-E", "-c", code], cwd="/", capture_output=True, check=False)
    except OSError as error:
        raise ConfigError(f"python: {python} cannot be run: {error.strerror}") from error
    if done.returncode:
        raise ConfigError(f"python: {python} has no vLLM: `{python} -m pip install vllm`")
    return python


class VllmServer:
    """The server's process. See `Server`."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._key = secrets.token_urlsafe(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._address = Address("")
        self._log: Path | None = None
        self._started_s = 0.0
        self._has_been_well = self._is_well = False

    async def ready(self, report: Callable[[str], None] = _log.info) -> Address:
        """Where it answers. It is started if it does not run, and waited for.

        Raises:
            EngineError: it does not start, or has ended too often; has the last lines of its log.
        """
        while not (self._is_well and self.runs()):
            self._is_well = False
            if not self.runs():
                self._begin(report)
            await self._wait(report)
        return self._address

    def runs(self) -> bool:
        """Whether it has been started, and has not ended."""
        return self._process is not None and self._process.poll() is None

    def doubt(self, address: Address) -> str:
        """It did not answer there: it has to show itself well once more. Returns the end of its log."""
        if address == self._address:
            self._is_well = False
            self._started_s = time.monotonic()
        return self._last_words()

    async def close(self) -> None:
        """End it and all of its processes."""
        await asyncio.to_thread(self._end)

    def _begin(self, report: Callable[[str], None]) -> None:
        num = self._address.start
        if num and not self._has_been_well:
            raise EngineError(f"vLLM did not start.{self._last_words()}")
        if num > _MAX_RESTARTS:
            raise EngineError(
                f"vLLM ended {num} times; it is not started again.{self._last_words()}"
            )
        self._end()
        if self._log is None:
            self._log = _new_log(self._start.model.name)
        report(f"{'starting vLLM again' if num else 'starting vLLM'}; its log is {self._log}")
        port = _free_port()
        self._has_been_well = False
        self._address = Address(f"http://{HOST}:{port}", self._key, num + 1)
        self._started_s = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    keeper.__file__,
                    str(os.getpid()),
                    *self._start.command(port),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._log.parent,
                env=self._start.environment(self._key),
                start_new_session=True,
            )

    async def _wait(self, report: Callable[[str], None]) -> None:
        """Until it is well, or has ended."""
        said_s = 0.0
        timeout = aiohttp.ClientTimeout(total=_HEALTH_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while self.runs():
                if await _is_well(session, self._address.url):
                    self._is_well = self._has_been_well = True
                    return
                waited_s = time.monotonic() - self._started_s
                if waited_s > self._start.timeout_s:
                    await self.close()
                    raise EngineError(
                        f"vLLM was not well within {self._start.timeout_s:g} s"
                        f" (`startup_timeout_s`) and was ended.{self._last_words()}"
                    )
                if waited_s - said_s > _REPORT_S:
                    said_s = waited_s
                    report(f"waiting for vLLM: {waited_s:.0f} s")
                await asyncio.sleep(_POLL_S)

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(keeper.GRACE_S * 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # Empty by now, unless the keeper itself was killed.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _MAX_TAIL))
            tail = file.read().decode(errors="replace").splitlines()
        return "\n".join(["", f"The end of {self._log}:", *tail[-_MAX_LINES:]])


async def _is_well(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/health") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def _new_log(name: str) -> Path:
    folder = home() / "vllm"
    folder.mkdir(parents=True, exist_ok=True)
    file, path = tempfile.mkstemp(".log", f"{name}-", folder)
    os.close(file)
    return Path(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
