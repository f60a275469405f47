"""The `kubernetes` backend: a pod per sandbox.

A pod has two containers. In `sandbox`, of the task's image, an agent of ours is pid 1, with the code that
serves local sandboxes and containers. In `channel`, of an image of ours, a relay (see `relay`) connects it
with this process, by `exec` into that container. So sandboxed code meets no network and nothing that could
be imitated, and a stream that breaks is taken up again. When this process dies, the relay ends, and with it
the pod.
"""

import asyncio
import contextlib
import json
import re
import secrets
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from kat_sandboxes.client import ChannelSandbox
from kat_sandboxes.docker.container import Shape, hello
from kat_sandboxes.docker.engine import MARK
from kat_sandboxes.docker.image import Built
from kat_sandboxes.failure import no_room_said
from kat_sandboxes.kubernetes import manifest
from kat_sandboxes.kubernetes.api import Api, GoneError
from kat_sandboxes.kubernetes.config import KubernetesConfig
from kat_sandboxes.kubernetes.image import Builder
from kat_sandboxes.kubernetes.manifest import Images
from kat_sandboxes.kubernetes.pods import Pods
from kat_sandboxes.kubernetes.tunnel import Tunnel
from kat_sandboxes.zygote import frame
from katcore.config import home
from katcore.errors import ImageMissingError, SandboxElsewhereError, SandboxError
from katcore.protocols import Sandbox
from katcore.sandbox.image import BUILDING
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec

_NAME = re.compile(r"katcore-pods-(?P<place>[0-9a-f]{6})-")
_STATUS_S = 10.0
"""How long a status may take that says why a pod has ended."""


class PodSandbox(ChannelSandbox):
    """A pod. Nothing but its beginning and end passes through the API's objects."""

    def __init__(self, channel: socket.socket, pods: Pods, name: str) -> None:
        super().__init__(channel, self._ended)
        self._pods = pods
        self._name = name

    def handle(self) -> str:
        """See `SupportsHandle`: the pod's name."""
        return self._name

    async def _ended(self) -> str:
        raise await self._pods.end(self._name, _STATUS_S)


class KubernetesBackend:
    """Opens pods. Its mark is their label, and begins their names."""

    def __init__(self, config: KubernetesConfig) -> None:
        self._config = config
        self._api = Api(config)
        self._mark = f"katcore-pods-{self._api.place}-{secrets.token_hex(6)}"
        self._pods = Pods(self._api, self._mark)
        self._builder = Builder(config, self._mark)
        self._lock = asyncio.Lock()
        self._creating = asyncio.Semaphore(config.together)
        self._has_policy = not config.makes_policy
        self._num = 0

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """See `SandboxBackend.open`."""
        return self._open(spec)

    async def close(self) -> None:
        """See `SandboxBackend.close`."""
        await self._pods.close()
        try:
            if self._num:
                await self._sweep(self._mark)
        finally:
            self._builder.close()
            await self._api.close()

    def mark(self) -> str:
        """See `SupportsReap.mark`."""
        return self._mark

    async def destroy(self, lease: Lease) -> None:
        """See `SupportsReap.destroy`."""
        self._refuse_elsewhere(lease.handle, was_there=await self._delete(lease.handle))

    async def sweep(self, holder: Holder) -> None:
        """See `SupportsReap.sweep`."""
        self._refuse_elsewhere(holder.mark, was_there=await self._sweep(holder.mark) > 0)

    async def manifest(self, spec: SandboxSpec) -> str:
        """See `SupportsManifest`."""
        images = await self._builder.names(spec)
        made = [manifest.policy()] if self._config.makes_policy else []
        made.append(manifest.pod(f"{self._mark}-1", self._mark, spec, images, self._config))
        for item in made:
            item["metadata"]["namespace"] = self._api.namespace
        return json.dumps({"apiVersion": "v1", "kind": "List", "items": made}, indent=2)

    @asynccontextmanager
    async def _open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        if spec.snapshot:
            raise ImageMissingError(
                f"there is no snapshot {spec.snapshot}: pods have none, only local sandboxes do"
            )
        with no_room_said():
            images, built = await self._builder.make(spec)
        await self._make_policy()
        self._num += 1
        name = f"{self._mark}-{self._num}"
        self._pods.expect(name)
        tunnel: Tunnel | None = None
        try:
            await self._create(name, spec, images)
            await self._pods.ready(name, self._config.start_s)
            command = manifest.pump(images.bundle)
            tunnel = Tunnel(
                lambda: self._api.execute(name, manifest.CHANNEL, command),
                self._config.patience_s,
                has_door=spec.has_door,
            )
            sandbox = PodSandbox(tunnel.channel, self._pods, name)
            try:
                await self._greet(sandbox, tunnel, built, spec)
                yield sandbox
            finally:
                sandbox.close()
        finally:
            await self._end(name, tunnel)

    async def _greet(
        self, sandbox: PodSandbox, tunnel: Tunnel, built: Built, spec: SandboxSpec
    ) -> None:
        text = frame.pack(hello(Shape.of(spec, built), spec))
        await asyncio.get_running_loop().sock_sendall(tunnel.channel, text)
        await sandbox.ready()

    async def _make_policy(self) -> None:
        async with self._lock:
            if self._has_policy:
                return
            path = f"/apis/networking.k8s.io/v1/namespaces/{self._api.namespace}/networkpolicies"
            try:
                await self._api.call("GET", f"{path}/{manifest.POLICY}")
            except GoneError:
                with contextlib.suppress(SandboxError):
                    await self._api.call("POST", path, body=manifest.policy())
                await self._api.call("GET", f"{path}/{manifest.POLICY}")
            self._has_policy = True

    async def _create(self, name: str, spec: SandboxSpec, images: Images) -> None:
        body = manifest.pod(name, self._mark, spec, images, self._config)
        async with self._creating:
            await self._api.call("POST", self._api.pods, body=body)

    async def _end(self, name: str, tunnel: Tunnel | None) -> None:
        try:
            if tunnel:
                await tunnel.close()
        finally:
            await self._delete(name)
            self._pods.forget(name)

    async def _delete(self, name: str) -> bool:
        """Whether it was there. Its name begins with a mark, so that it is nobody else's."""
        try:
            await self._api.call("DELETE", f"{self._api.pods}/{name}")
        except GoneError:
            return False
        return True

    async def _sweep(self, mark: str) -> int:
        query = {"labelSelector": f"{MARK}={mark}"}
        listed = await self._api.call("GET", self._api.pods, query=query)
        names = [item["metadata"]["name"] for item in listed.get("items", ())]
        for name in names:
            await self._delete(name)
        for unfinished in (home() / "kubernetes").glob(f"{BUILDING}{mark}-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        return len(names)

    def _refuse_elsewhere(self, name: str, *, was_there: bool) -> None:
        found = _NAME.match(name)
        if found and not was_there and found["place"] != self._api.place:
            raise SandboxElsewhereError(
                f"{name} was made in another cluster or namespace than {self._api.namespace} of this"
                " kubeconfig: reap with the options and KUBECONFIG of then"
            )
