"""The proxy of the benchmark, as a run has it: training mode, its log on disk, a session for each stream."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from katcore.bench.engine import IdsEngine
from katcore.bench.exchange import MODEL
from katcore.bench.process import serve_lines
from katcore.inference.upstream import UpstreamEngine
from katcore.protocols import Engine
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget, Session, SessionSpec
from katcore.schema.call import Sampling

_ENDLESS = Budget(max_calls=1 << 30, max_tokens=1 << 40, seconds=1e9)
_SAMPLING = Sampling(max_tokens=4096)


class Behind:
    """The proxy with an engine in front of the mock."""

    def __init__(self, held: AsyncExitStack) -> None:
        self._held = held
        self._proxy: Proxy | None = None
        self._engine: Engine | None = None
        self._sessions: list[Session] = []

    async def answer(self, line: dict[str, Any]) -> object:
        """The first line says which engine and where the log is; each other, how many sessions to open."""
        if self._proxy is None:
            self._proxy = await self._held.enter_async_context(Proxy(Path(line["log"])))
            self._engine = await self._make(line["engine"], line["url"], line["chunks"])
            return {}
        return await self._open(self._proxy, line["sessions"])

    async def _make(self, engine: str, url: str, chunks: int) -> Engine:
        if engine == "upstream":
            upstream = UpstreamEngine("openai", f"{url}/v1", MODEL, "no key")
            self._held.push_async_callback(upstream.close)
            return upstream
        from katcore.inference.bytes import byte_chat  # noqa: PLC0415 - takes seconds

        connector = aiohttp.TCPConnector(limit=0)
        http = await self._held.enter_async_context(aiohttp.ClientSession(connector=connector))
        made = IdsEngine(url, byte_chat(), http)
        await made.prepare(chunks)
        return made

    async def _open(self, proxy: Proxy, num: int) -> object:
        """New sessions in place of those before, as a run has them: a session ends with its rollout."""
        assert self._engine
        for session in self._sessions:
            await proxy.close(session)
        opened = [
            proxy.open(SessionSpec(f"stream-{at}", self._engine, _SAMPLING, _ENDLESS))
            for at in range(num)
        ]
        self._sessions = [session for session, _ in opened]
        return {"url": opened[0][1].base_url, "keys": [endpoint.api_key for _, endpoint in opened]}


async def main() -> None:
    """Serve until standard input ends."""
    async with AsyncExitStack() as held:
        await serve_lines(Behind(held).answer)


if __name__ == "__main__":
    asyncio.run(main())
