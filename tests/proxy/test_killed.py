"""kill -9 at any moment: every answer that an agent got is in the log."""

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp

from katcore.trajectory.calls import CallLog, read_calls

_SERVER = """
import asyncio, sys
from pathlib import Path
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, SessionSpec
from katcore.schema.call import Sampling
from tests.proxy.fakes import FakeEngine

async def main():
    async with Proxy(Path(sys.argv[1])) as proxy:
        spec = SessionSpec("s", FakeEngine(), Sampling(), Budget(max_calls=10**6))
        _, endpoint = proxy.open(spec)
        print(endpoint.base_url, endpoint.api_key, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def talk(base_url: str, key: str, released: list[str]) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        while True:
            body = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
            try:
                async with http.post(f"{base_url}/v1/chat/completions", json=body) as response:
                    released.append((await response.json())["id"].removeprefix("chatcmpl-"))
            except (aiohttp.ClientError, OSError):
                return


async def test_killed_again_and_again_it_loses_no_released_answer(tmp_path: Path) -> None:
    log = tmp_path / "calls.jsonl"
    released: list[str] = []
    choose = random.Random(1)
    for _ in range(5):
        process = subprocess.Popen(  # noqa: ASYNC220 - it is killed, not awaited
            [sys.executable, "-c", _SERVER, str(log)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        base_url, key = (await asyncio.to_thread(process.stdout.readline)).split()
        talks = [asyncio.create_task(talk(base_url, key, released)) for _ in range(8)]
        await asyncio.sleep(choose.uniform(0.1, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        await asyncio.gather(*talks)
    assert len(released) > 50
    recorded = {call.call_id for call in read_calls(log)}
    assert recorded.issuperset(released)
    CallLog(log).close()
    assert log.read_bytes().endswith(b"\n")
