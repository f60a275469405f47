"""When a relay gives up its backend."""

import asyncio
import socket
from pathlib import Path

import pytest

from kat_sandboxes.kubernetes import relay
from kat_sandboxes.zygote import frame

PATIENCE_S = 1.5


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHANNEL", "CONTROL"):
        monkeypatch.setattr(relay, name, str(tmp_path / name))


async def _connect(channel: socket.socket, path: str) -> None:
    async with asyncio.timeout(20):
        while channel.connect_ex(path):  # noqa: ASYNC110 - nothing says when it listens
            await asyncio.sleep(0.01)


async def _begin() -> tuple[asyncio.Task[None], socket.socket, asyncio.StreamWriter]:
    """A relay at work, its machine, and a stream that has greeted it."""
    work = asyncio.create_task(relay._Relay(PATIENCE_S).run())
    machine = socket.socket(socket.AF_UNIX)
    await _connect(machine, relay.CHANNEL)
    control = socket.socket(socket.AF_UNIX)
    await _connect(control, relay.CONTROL)
    _, writer = await asyncio.open_unix_connection(sock=control)
    writer.write(frame.pack({"got": 0}))
    return work, machine, writer


@pytest.mark.usefixtures("paths")
async def test_a_stream_that_says_nothing_does_not_keep_it() -> None:
    work, machine, writer = await _begin()
    with machine:
        async with asyncio.timeout(20):
            await work
        writer.close()


@pytest.mark.usefixtures("paths")
async def test_a_stream_that_asks_keeps_it() -> None:
    work, machine, writer = await _begin()
    with machine:
        for _ in range(20):
            writer.write(frame.pack({"got": 0, "ask": True}))
            await asyncio.sleep(PATIENCE_S / 10)
        assert not work.done()
        writer.close()
        async with asyncio.timeout(20):
            await work
