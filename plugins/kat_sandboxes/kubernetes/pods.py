"""The pods of one backend as the cluster sees them: one list, and one watch for all of them."""

import asyncio
import contextlib
import logging
from typing import Any

import aiohttp

from kat_sandboxes.docker.engine import MARK
from kat_sandboxes.kubernetes import status
from kat_sandboxes.kubernetes.api import Api, GoneError
from katcore.errors import EvictedError, SandboxError

_AGAIN_S, _MOST_S = 0.2, 10.0
_log = logging.getLogger(__name__)


class Pods:
    """Follows all pods with a mark. A watch that ends goes on where it was, if that is not too long ago."""

    def __init__(self, api: Api, mark: str) -> None:
        self._api = api
        self._query = {"labelSelector": f"{MARK}={mark}"}
        self._known: dict[str, dict[str, Any]] = {}
        self._deleted: set[str] = set()
        self._changed: dict[str, asyncio.Event] = {}
        self._version = ""
        self._task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Follow no more."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def expect(self, name: str) -> None:
        """A pod of this name is about to be made."""
        self._changed[name] = asyncio.Event()
        if self._task is None:
            self._task = asyncio.create_task(self._follow())

    def forget(self, name: str) -> None:
        """It is of no interest any more."""
        self._changed.pop(name, None)
        self._known.pop(name, None)
        self._deleted.discard(name)

    async def ready(self, name: str, start_s: float) -> None:
        """Wait until what is in a pod runs. Raises SandboxError: it never will, or not in time."""
        try:
            async with asyncio.timeout(start_s):
                while not self._is_ready(name):
                    await self._change(name)
        except TimeoutError:
            raise status.late(self._known.get(name), name, start_s) from None

    async def end(self, name: str, patience_s: float) -> SandboxError:
        """What became of a pod that does not answer. Its status may be late by so much."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while True:
                    if name in self._deleted:
                        return EvictedError(f"the pod {name} was deleted")
                    pod = self._known.get(name)
                    if error := pod and status.ended(pod):
                        return error
                    await self._change(name)
        return status.unreachable(self._known.get(name), name)

    def _is_ready(self, name: str) -> bool:
        if name in self._deleted:
            raise EvictedError(f"the pod {name} was deleted before it was ready")
        return name in self._known and status.is_ready(self._known[name])

    async def _change(self, name: str) -> None:
        event = self._changed.setdefault(name, asyncio.Event())
        event.clear()
        await event.wait()

    async def _follow(self) -> None:
        delay_s = _AGAIN_S
        while True:
            try:
                if not self._version:
                    await self._list()
                query = {**self._query, "resourceVersion": self._version}
                async for event in self._api.watch(self._api.pods, query):
                    delay_s = _AGAIN_S
                    self._note(event["type"], event["object"])
            except GoneError:
                self._version = ""
            except (OSError, aiohttp.ClientError, TimeoutError, SandboxError, ValueError) as error:
                _log.warning("the watch of pods is tried again in %g s: %s", delay_s, error)
                await asyncio.sleep(delay_s)
                delay_s = min(_MOST_S, 2 * delay_s)

    async def _list(self) -> None:
        listed = await self._api.call("GET", self._api.pods, query=self._query)
        there = {item["metadata"]["name"]: item for item in listed.get("items", ())}
        for name in set(self._known) - set(there):
            self._note("DELETED", self._known[name])
        for pod in there.values():
            self._note("MODIFIED", pod)
        self._version = listed["metadata"]["resourceVersion"]

    def _note(self, kind: str, pod: dict[str, Any]) -> None:
        about = pod["metadata"]
        self._version = about.get("resourceVersion", self._version)
        name = about.get("name", "")
        if kind == "BOOKMARK" or name not in self._changed:
            return
        self._known[name] = pod
        if kind == "DELETED":
            self._deleted.add(name)
        self._changed[name].set()
