"""A cluster's API for tests, over real HTTP and WebSockets; a kubelet of the test's choice runs its pods."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from aiohttp import WSMsgType, web

TOKEN = "a-token-of-the-test"
NAMESPACE = "experiments"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_POLICIES = f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies"

Json = dict[str, Any]


class Kubelet(Protocol):
    """Runs pods."""

    async def run(self, pod: Json, tell: Callable[[Json], None]) -> None:
        """Run a pod; `tell` takes each new status."""

    async def stop(self, pod: Json) -> None:
        """End it."""

    async def execute(
        self, pod: Json, container: str, argv: list[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Run a command in a container."""


def running() -> Json:
    """The status of a pod of which all runs."""
    states = [{"name": name, "state": {"running": {}}} for name in ("channel", "sandbox")]
    return {"phase": "Running", "containerStatuses": states}


class Cluster:
    """One namespace. It fails by `fault`, `is_away`, `compact`, `break_watches`, `cut`."""

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet
        self.pods: dict[str, Json] = {}
        self.policies: dict[str, Json] = {}
        self.answers: list[tuple[str, int, dict[str, str], str]] = []
        self.is_away = False
        self.seen: list[str] = []
        self.watches = 0
        self._version = 1
        self._oldest = 0
        self._events: list[tuple[int, str, Json]] = []
        self._changed = asyncio.Condition()
        self._epoch = 0
        self._sockets: set[web.WebSocketResponse] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.url = ""

    @contextlib.asynccontextmanager
    async def serve(self, folder: Path) -> AsyncIterator[Path]:
        """Serve; gives a kubeconfig."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get(_PODS, self._list)
        app.router.add_post(_PODS, self._create)
        app.router.add_delete(f"{_PODS}/{{name}}", self._delete)
        app.router.add_get(f"{_PODS}/{{name}}/exec", self._exec)
        app.router.add_post(_POLICIES, self._create_policy)
        app.router.add_get(f"{_POLICIES}/{{name}}", self._policy)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        path = folder / "kubeconfig"
        path.write_text(json.dumps(self._kubeconfig()))
        try:
            yield path
        finally:
            for task in self._tasks.values():
                task.cancel()
            for pod in self.pods.values():
                await self._kubelet.stop(pod)
            await self.cut()
            await runner.cleanup()

    def fault(self, request: str, status: int, said: str = "", **headers: str) -> None:
        """Answer the next request that matches so: "POST pods", say."""
        self.answers.append((request, status, headers, said))

    def compact(self) -> None:
        """Forget all events: a watch from before gets 410."""
        self._oldest = self._version
        self._events.clear()

    async def break_watches(self) -> None:
        """End all watches."""
        async with self._changed:
            self._epoch += 1
            self._changed.notify_all()

    async def cut(self) -> None:
        """Cut all streams of `exec`, as an API server that is restarted does."""
        for socket in list(self._sockets):
            transport = socket._req.transport if socket._req else None
            if transport:
                transport.abort()

    async def tell(self, name: str, status: Json, kind: str = "MODIFIED") -> None:
        """Give a pod a new status."""
        async with self._changed:
            self._version += 1
            pod = self.pods[name] = {**self.pods[name], "status": status}
            pod["metadata"] = {**pod["metadata"], "resourceVersion": str(self._version)}
            self._events.append((self._version, kind, pod))
            if kind == "DELETED":
                del self.pods[name]
            self._changed.notify_all()

    def _kubeconfig(self) -> Json:
        context = {"cluster": "c", "user": "u", "namespace": NAMESPACE}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": "x", "context": context}],
        }

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        what = f"{request.method} {request.path.rsplit('/', 1)[1]}"
        self.seen.append(what)
        if self.is_away:
            assert request.transport
            request.transport.abort()
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _refused(401, "Unauthorized")
        for number, (wanted, status, headers, said) in enumerate(self.answers):
            if re.fullmatch(wanted, what):
                del self.answers[number]
                return _refused(status, said, headers)
        return await handler(request)

    async def _create(self, request: web.Request) -> web.Response:
        pod = await request.json()
        name = pod["metadata"]["name"]
        if name in self.pods:
            return _refused(409, f'pods "{name}" already exists')
        self.pods[name] = pod
        await self.tell(name, {"phase": "Pending"}, "ADDED")
        self._tasks[name] = asyncio.create_task(self._run(name))
        return web.json_response(self.pods[name], status=201)

    async def _run(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        work: set[asyncio.Task[None]] = set()

        def told(status: Json) -> None:
            if name in self.pods:
                work.add(loop.create_task(self.tell(name, status)))

        await self._kubelet.run(self.pods[name], told)

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self.pods:
            return _refused(404, f'pods "{name}" not found')
        self._tasks.pop(name).cancel()
        pod = self.pods[name]
        await self._kubelet.stop(pod)
        if name in self.pods:
            await self.tell(name, pod.get("status", {}), "DELETED")
        return web.json_response(pod)

    def _chosen(self, request: web.Request, pod: Json) -> bool:
        key, _, value = request.query.get("labelSelector", "").partition("=")
        return not key or pod["metadata"]["labels"].get(key) == value

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch"):
            return await self._watch(request)
        items = [pod for pod in self.pods.values() if self._chosen(request, pod)]
        about = {"resourceVersion": str(self._version)}
        return web.json_response({"kind": "PodList", "metadata": about, "items": items})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.watches += 1
        since, epoch = int(request.query["resourceVersion"]), self._epoch
        response = web.StreamResponse()
        await response.prepare(request)

        async def say(kind: str, item: Json) -> None:
            await response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")

        if since < self._oldest:
            await say(
                "ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"}
            )
            return response
        while True:
            async with self._changed:
                while self._version <= since and self._epoch == epoch:
                    await self._changed.wait()
            if self._epoch != epoch:
                assert request.transport
                request.transport.abort()
                return response
            for version, kind, pod in list(self._events):
                if version > since and self._chosen(request, pod):
                    await say(kind, pod)
            since = self._version

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in self.pods:
            return _refused(404, f'pods "{name}" not found')
        socket = web.WebSocketResponse(protocols=["v4.channel.k8s.io"], max_msg_size=0)
        await socket.prepare(request)
        assert socket.ws_protocol == "v4.channel.k8s.io"
        self._sockets.add(socket)
        try:
            argv = request.query.getall("command")
            found = await self._kubelet.execute(self.pods[name], request.query["container"], argv)
            await _bridge(socket, *found)
        except OSError:
            await socket.close()
        finally:
            self._sockets.discard(socket)
        return socket

    async def _create_policy(self, request: web.Request) -> web.Response:
        policy = await request.json()
        self.policies[policy["metadata"]["name"]] = policy
        return web.json_response(policy, status=201)

    async def _policy(self, request: web.Request) -> web.Response:
        found = self.policies.get(request.match_info["name"])
        return web.json_response(found) if found else _refused(404, "networkpolicies not found")


def _refused(status: int, said: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "message": said, "code": status}
    return web.json_response(body, status=status, headers=headers)


async def _bridge(
    socket: web.WebSocketResponse, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    async def out() -> None:
        while data := await reader.read(1 << 16):
            await socket.send_bytes(b"\x01" + data)
        await socket.send_bytes(b"\x03" + json.dumps({"status": "Success"}).encode())
        await socket.close()

    saying = asyncio.create_task(out())
    try:
        async for message in socket:
            if message.type is WSMsgType.BINARY and message.data[:1] == b"\x00":
                writer.write(message.data[1:])
                await writer.drain()
    except OSError:
        pass
    finally:
        saying.cancel()
        writer.transport.abort()
        await asyncio.gather(saying, return_exceptions=True)
