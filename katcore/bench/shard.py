"""A share of the sandboxes that are held, in a process of its own: it has descriptors of its own.

`python -m katcore.bench.shard` reads its share, a line of JSON, and says that it is ready. To each further
line it does what comes next: it opens them all, asks them all, and in the end, or when nobody is there any
more, closes them.
"""

import asyncio
import json
import resource
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from katcore.bench import holding
from katcore.plugin import Plugins
from katcore.protocols import SandboxBackend
from katcore.schema.task import SandboxSpec


async def _main() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    share = json.loads(await _line())
    backend: SandboxBackend = Plugins.installed().make("sandbox", share["backend"], {})
    try:
        spec = await holding.with_door(backend, SandboxSpec(Path(share["environment"])))
        _say({})
        async with AsyncExitStack() as opened:
            if not await _line():
                return
            kept, why = await holding.fill(backend, spec, share, opened)
            _say({"alive": len(kept), "doors": holding.take_doors(kept, opened), "why": why})
            await _line()
            _say({"answering": await holding.ask_all(kept)})
            await _line()
    finally:
        await backend.close()


async def _line() -> str:
    return await asyncio.to_thread(sys.stdin.readline)


def _say(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main())
