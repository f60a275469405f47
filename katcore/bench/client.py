"""The client of the benchmark: many streams at once, each one request after the other, to the last byte.

The same code talks to everything that is compared. Requests are made before the clock starts, and answers are
read after it stops.
"""

import asyncio
import gc
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp

from katcore.bench.exchange import answer_chunks, body, read_answer
from katcore.bench.process import serve_lines

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask of whom. There is a stream for each key, and each asks `requests` times.

    Before that, and before the clock starts, each asks once; `first` is the number of its first request.
    """

    url: str
    keys: list[str]
    requests: int
    first: int
    chunks: int
    is_streamed: bool


@dataclass(frozen=True, slots=True)
class _Given:
    """What a request got: after how long, and what."""

    seconds: float
    status: int
    data: bytes


class _Streams:
    def __init__(self, plan: Plan, http: aiohttp.ClientSession) -> None:
        self._plan = plan
        self._http = http
        self._url = f"{plan.url}/v1/chat/completions"
        numbers = range(plan.first, plan.first + 1 + plan.requests)
        self._bodies = [
            [body(stream, number, is_streamed=plan.is_streamed) for number in numbers]
            for stream in range(len(plan.keys))
        ]
        self.given: list[_Given] = []
        self.failures: Counter[str] = Counter()

    async def warm_up(self) -> list[_Given]:
        """One request of each stream; what they got is not measured, but may not be lost either."""
        await asyncio.gather(*(self._one(stream, 0) for stream in range(len(self._plan.keys))))
        taken, self.given = self.given, []
        return taken

    async def run(self) -> float:
        """All other requests; returns how long they took."""
        started_s = time.perf_counter()
        await asyncio.gather(*(self._stream(stream) for stream in range(len(self._plan.keys))))
        return time.perf_counter() - started_s

    async def _stream(self, stream: int) -> None:
        for at in range(1, self._plan.requests + 1):
            await self._one(stream, at)

    async def _one(self, stream: int, at: int) -> None:
        headers = {
            "Authorization": f"Bearer {self._plan.keys[stream]}",
            "Content-Type": "application/json",
        }
        data = self._bodies[stream][at]
        started_s = time.perf_counter()
        try:
            async with self._http.post(self._url, data=data, headers=headers) as response:
                got = await response.read()
            self.given.append(_Given(time.perf_counter() - started_s, response.status, got))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.failures[f"{type(error).__name__}: {error}"] += 1


async def measure(plan: Plan) -> dict[str, Any]:
    """The report of a plan: seconds, latencies and ids of the right answers, and what was lost."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        streams = _Streams(plan, http)
        warm = await streams.warm_up()
        gc.collect()
        gc.freeze()
        seconds = await streams.run()
        gc.unfreeze()
    ids: list[str] = []
    latencies: list[float] = []
    for number, given in enumerate((*warm, *streams.given)):
        try:
            ids.append(_checked(given, plan))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            streams.failures[str(error) or repr(error)] += 1
            continue
        if number >= len(warm):
            latencies.append(given.seconds * 1000)
    return {
        "seconds": seconds,
        "latencies_ms": latencies,
        "ids": ids,
        "failures": dict(streams.failures),
    }


def _checked(given: _Given, plan: Plan) -> str:
    """The id of an answer that is whole and the right one; a ValueError says why it is not."""
    if given.status != 200:
        raise ValueError(f"status {given.status}: {given.data[:200]!r}")
    answer = read_answer(given.data, is_streamed=plan.is_streamed)
    if answer.text != "".join(answer_chunks(plan.chunks)):
        raise ValueError(f"another answer, that ends with {answer.text[-40:]!r}")
    return answer.id


async def main() -> None:
    """Carry out the plan of each line."""

    async def carry_out(plan: dict[str, Any]) -> object:
        return await measure(Plan(**plan))

    await serve_lines(carry_out)


if __name__ == "__main__":
    asyncio.run(main())
