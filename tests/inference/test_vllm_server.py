"""A server of our own: how it is started, watched and ended, with a small program in vLLM's place."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from katcore.errors import ConfigError, EngineError
from katcore.inference.vllm_server import Start, VllmServer, find_python

PROGRAM = """#!{python} -S
import http.server, json, os, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
if "-c" in sys.argv:
    sys.exit((here / "no-vllm").exists())
worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
said = {{"argv": sys.argv[1:], "env": dict(os.environ), "pids": [os.getpid(), worker.pid]}}
(here / "started.jsonl").open("a").write(json.dumps(said) + "\\n")
print("CUDA out of memory", flush=True)
if (here / "broken").exists():
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if (here / "slow").exists() else 200)
        self.end_headers()

    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    python = tmp_path / "python"
    python.write_text(PROGRAM.format(python=sys.executable))
    python.chmod(0o755)
    return Start(tmp_path / "model", python)


@pytest.fixture
async def server(start: Start) -> AsyncIterator[VllmServer]:
    made = VllmServer(start)
    yield made
    await made.close()


def started(start: Start) -> list[Any]:
    return [json.loads(line) for line in (start.python.parent / "started.jsonl").open()]


def running(pids: list[int]) -> list[int]:
    def is_alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if is_alive(pid)]


def wait_for_end(pids: list[int]) -> None:
    until_s = time.monotonic() + 30
    while left := running(pids):
        assert time.monotonic() < until_s, f"still running: {left}"
        time.sleep(0.05)


async def test_it_listens_on_loopback_with_what_the_engine_needs(
    server: VllmServer, start: Start
) -> None:
    said: list[str] = []
    address = await server.ready(said.append)
    async with aiohttp.ClientSession() as session, session.get(f"{address.url}/health") as answer:
        assert answer.status == 200
    (seen,) = started(start)
    options = dict(zip(seen["argv"][2::2], seen["argv"][3::2], strict=True))
    assert seen["argv"][:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert address.url == f"http://127.0.0.1:{options.pop('--port')}"
    assert options == {
        "--model": str(start.model),
        "--served-model-name": "model",
        "--host": "127.0.0.1",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }
    assert seen["env"]["VLLM_API_KEY"] == address.key
    assert len(address.key) > 30
    assert address.key not in str(seen["argv"]) + repr(address)
    assert "VLLM_SERVER_DEV_MODE" not in seen["env"]
    assert "its log is" in said[0]
    assert await server.ready(said.append) == address
    assert len(started(start)) == 1


async def test_arguments_stand_above_ours_and_weights_need_a_word(start: Start) -> None:
    wanted = replace(start, arguments=("--seed", "3"), takes_weights=True)
    assert wanted.command(5)[-2:] == ["--seed", "3"]
    assert wanted.environment("k")["VLLM_SERVER_DEV_MODE"] == "1"
    for given in (("--port", "80"), ("--api_key=x",)):
        with pytest.raises(ConfigError, match="is chosen by katcore"):
            replace(start, arguments=given)


async def test_what_it_can_do_besides_is_asked_for(start: Start) -> None:
    plain = start.environment("k")
    assert not plain.keys() & {"VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE"}
    able = replace(start, adapter_rank=10, sleeps=True, devices=(2, 3))
    flags = " ".join(able.command(5))
    assert "--enable-sleep-mode --enable-lora --max-lora-rank 16 --max-loras 2" in flags
    given = able.environment("k")
    assert given["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert given["VLLM_SERVER_DEV_MODE"] == "1"
    assert given["CUDA_VISIBLE_DEVICES"] == "2,3"


async def test_closing_ends_all_of_its_processes(server: VllmServer, start: Start) -> None:
    await server.ready()
    (seen,) = started(start)
    assert running(seen["pids"]) == seen["pids"]
    await server.close()
    assert running(seen["pids"]) == []


async def test_it_is_started_again_a_few_times(server: VllmServer, start: Start) -> None:
    for number in range(1, 5):
        address = await server.ready()
        assert address.start == number
        pids = started(start)[-1]["pids"]
        os.kill(pids[0], signal.SIGKILL)
        assert "CUDA out of memory" in server.doubt(address)
        await asyncio.to_thread(wait_for_end, pids)
    with pytest.raises(EngineError, match=r"ended 4 times(.|\n)*the server ended with code -9"):
        await server.ready()
    assert len(started(start)) == 4


async def test_a_doubt_without_reason_starts_nothing(server: VllmServer, start: Start) -> None:
    address = await server.ready()
    server.doubt(address)
    assert await server.ready() == address
    assert len(started(start)) == 1


async def test_one_that_does_not_start_says_why_and_is_left(
    server: VllmServer, start: Start
) -> None:
    (start.python.parent / "broken").touch()
    for _ in range(2):
        with pytest.raises(EngineError, match=r"did not start(.|\n)*CUDA out of memory"):
            await server.ready()
    (seen,) = started(start)
    await asyncio.to_thread(wait_for_end, seen["pids"])


async def test_one_that_is_not_well_in_time_is_ended(server: VllmServer, start: Start) -> None:
    address = await server.ready()
    slow = start.python.parent / "slow"
    slow.touch()
    server.doubt(address)
    server._start = replace(start, timeout_s=1.0)
    with pytest.raises(EngineError, match=r"not well within 1 s(.|\n)*CUDA out of memory"):
        await server.ready()
    assert running(started(start)[0]["pids"]) == []
    slow.unlink()
    server._start = start
    assert (await server.ready()).start == 2


async def test_who_gives_up_waiting_leaves_it_to_the_next(server: VllmServer, start: Start) -> None:
    slow = start.python.parent / "slow"
    slow.touch()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await server.ready()
    slow.unlink()
    assert (await server.ready()).start == 1


PARENT = """
import asyncio, sys
from pathlib import Path
from katcore.inference.vllm_server import Start, VllmServer
async def main():
    await VllmServer(Start(Path("model"), Path(sys.argv[1]))).ready()
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_nothing_outlives_us_even_if_we_are_killed(start: Start) -> None:
    command = [sys.executable, "-c", PARENT, str(start.python)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        assert parent.stdout.readline() == "ready\n"
        (seen,) = started(start)
        assert running(seen["pids"]) == seen["pids"]
        parent.kill()
    wait_for_end(seen["pids"])


def test_an_interpreter_has_to_have_vllm(start: Start) -> None:
    assert find_python(start.python) == start.python
    (start.python.parent / "no-vllm").touch()
    with pytest.raises(ConfigError, match="pip install vllm"):
        find_python(start.python)
    with pytest.raises(ConfigError, match="cannot be run"):
        find_python(start.python / "nothing")
