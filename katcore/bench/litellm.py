"""LiteLLM's proxy, in an environment of its own: made on demand, started with one worker and no extras."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import yaml

from katcore.bench.exchange import MODEL
from katcore.bench.process import end, tail
from katcore.config import environment
from katcore.errors import BenchError
from katcore.pipeline.parent import die_with_parent
from katcore.service.port import choose

VERSION = "1.106.2"
_INSTALL_S = 1800.0
_START_S = 180.0


def find(path: Path) -> Path:
    """LiteLLM's program in an environment, given by its folder or its Python.

    Raises:
        BenchError: there is none.
    """
    program = (path / "bin" if path.is_dir() else path.parent) / "litellm"
    if not program.is_file():
        raise BenchError(
            f"{path}: no LiteLLM there: {program} is missing. Give the folder or the Python of an environment"
            " with 'litellm[proxy]', or leave --litellm out to have one made, or take --no-litellm"
        )
    return program


def version(program: Path) -> str:
    """Which LiteLLM that is; "" if its environment does not say."""
    found = program.parents[1].glob("lib/python*/site-packages/litellm-*.dist-info")
    return next((path.name.removesuffix(".dist-info").partition("-")[2] for path in found), "")


def ensure(root: Path, report: Callable[[str], None]) -> Path:
    """LiteLLM's program in an environment below `root`, which is made if it is not there.

    Raises:
        BenchError: it cannot be installed; says why.
    """
    folder = root / f"litellm-{VERSION}"
    done = folder / "complete"
    if not done.exists():
        report(f"installing litellm[proxy]=={VERSION} into {folder}, once")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        wanted = f"litellm[proxy]=={VERSION}"
        python = str(folder / "bin" / "python")
        if uv := shutil.which("uv"):
            _run([uv, "venv", "--python", sys.executable, str(folder)])
            _run([uv, "pip", "install", "--python", python, wanted])
        else:
            _run([sys.executable, "-m", "venv", str(folder)])
            _run([python, "-m", "pip", "install", "--no-input", wanted])
        find(folder)
        done.touch()
    return find(folder)


@asynccontextmanager
async def serving(program: Path, mock_url: str, folder: Path) -> AsyncIterator[str]:
    """Serve the mock's model; gives the URL once it answers.

    Raises:
        BenchError: it does not come up; says its last words.
    """
    config = folder / "litellm.yaml"
    config.write_text(yaml.safe_dump(_config(mock_url)))
    port = choose(14000 + os.getpid() % 4000, "LiteLLM", lambda _: None)
    log = folder / "litellm.log"
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            "--num_workers",
            "1",
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(),
            preexec_fn=die_with_parent(signal.SIGTERM),
        )
    url = f"http://127.0.0.1:{port}"
    try:
        await _wait(process, url, log)
        yield url
    finally:
        await end(process, signal.SIGTERM)


def _config(mock_url: str) -> dict[str, object]:
    """As its own documentation has it for benchmarks: no callbacks, no retries; and no keys to look up.

    The model has a name whose price it knows: it takes longer over one that it does not find.
    """
    there = {"model": "openai/gpt-4o", "api_base": f"{mock_url}/v1", "api_key": "no-key"}
    model = {
        "model_name": MODEL,
        "litellm_params": there,
        "model_info": {"base_model": "gpt-4o"},
    }
    return {
        "model_list": [model],
        # It listens on loopback, for the time of the benchmark, and has nothing behind it but the mock.
        "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
        "litellm_settings": {
            "callbacks": [],
            "num_retries": 0,
            "request_timeout": 600,
            "set_verbose": False,
            "telemetry": False,
        },
    }


def _environment() -> dict[str, str]:
    """Nothing of ours that it would read: no database, no keys, no list of prices from the network."""
    own = {
        name: value
        for name, value in environment().items()
        if name in {"PATH", "HOME", "LANG", "TMPDIR"}
    }
    return own | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
    }


async def _wait(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    until_s = time.monotonic() + _START_S
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < until_s:
            if process.returncode is not None:
                raise BenchError(f"LiteLLM ended with {process.returncode}: {tail(log)}")
            with suppress(aiohttp.ClientError, OSError):
                async with http.get(f"{url}/health/liveliness") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)
    raise BenchError(f"LiteLLM did not answer at {url} within {_START_S:g} s: {tail(log)}")


def _run(command: list[str]) -> None:
    try:
        subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_INSTALL_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{' '.join(command)}: not done after {_INSTALL_S:g} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stdout.decode(errors="replace").strip()[-600:]
        raise BenchError(f"{' '.join(command)}: {said}; or take --no-litellm") from error
