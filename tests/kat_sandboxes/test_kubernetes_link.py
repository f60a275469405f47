"""A link loses nothing and repeats nothing, however often its stream breaks."""

import asyncio
import random
from typing import Any

from kat_sandboxes.kubernetes.link import Link


class Pipe:
    """One end of a stream in memory, which breaks after so many bytes were written to it."""

    def __init__(self, budget: int) -> None:
        self._reader = asyncio.StreamReader()
        self._budget = budget
        self.other = self

    async def readexactly(self, n: int, /) -> bytes:
        return await self._reader.readexactly(n)

    async def write(self, data: bytes) -> None:
        await asyncio.sleep(0)
        taken = data[: self._budget]
        self._budget -= len(taken)
        if not self.other._reader.at_eof():
            self.other._reader.feed_data(taken)
        if not self._budget:
            self.other._reader.feed_eof()
            self._reader.feed_eof()
            raise ConnectionError


def pipes(budget: int) -> tuple[Pipe, Pipe]:
    one, two = Pipe(budget), Pipe(budget)
    one.other, two.other = two, one
    return one, two


async def test_all_arrives_once_and_in_order_over_streams_that_break() -> None:
    draw = random.Random(7)
    got: tuple[list[Any], list[Any]] = ([], [])

    def into(place: list[Any]) -> Any:
        async def deal(head: dict[str, Any], body: bytes) -> None:
            place.append((head["n"], body))

        return deal

    links = Link(into(got[0])), Link(into(got[1]))
    sent = [[(n, draw.randbytes(draw.randrange(40_000))) for n in range(60)] for _ in links]

    async def send(which: int) -> None:
        for n, body in sent[which]:
            await links[which].send({"n": n}, body)

    sending = [asyncio.create_task(send(which)) for which in (0, 1)]
    breaks = 0
    while len(got[0]) + len(got[1]) < 120:
        ends = pipes(draw.randrange(200, 300_000))
        serving = [
            asyncio.create_task(link.serve(end)) for link, end in zip(links, ends, strict=True)
        ]
        await asyncio.wait(serving, timeout=1)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        breaks += 1
    await asyncio.gather(*sending)
    assert breaks > 5
    assert got[1] == sent[0]
    assert got[0] == sent[1]
