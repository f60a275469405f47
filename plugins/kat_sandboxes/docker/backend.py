"""The `docker` backend: a container per sandbox, of an engine on this machine.

A container is started without network and capabilities, with limits and with an agent of ours as its init
(see `agent`). The agent connects to a socket that only this container is shown; commands, files and the door
pass through it, not through the engine, with the code that serves local sandboxes. So they mean the same,
take a millisecond, and go on while no engine is there. When this process dies, the agent ends with the
connection, and the engine removes the container.
"""

import asyncio
import contextlib
import logging
import re
import secrets
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kat_sandboxes import capacity, client, failure
from kat_sandboxes.docker import bundle, container, image
from kat_sandboxes.docker.config import DockerConfig
from kat_sandboxes.docker.container import DockerSandbox, Shape
from kat_sandboxes.docker.engine import MARK, Engine
from kat_sandboxes.failure import no_room_said
from kat_sandboxes.zygote import frame, live
from katcore.config import home
from katcore.errors import (
    ImageMissingError,
    SandboxElsewhereError,
    SandboxError,
    SandboxUnavailableError,
    StartTimeoutError,
)
from katcore.protocols import Sandbox
from katcore.sandbox.image import BUILDING
from katcore.schema.capacity import Capacity
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec

_LOOK_S = 1.0
"""How often to look whether a container that does not connect has ended."""
_NAME = re.compile(r"katcore-docker-(?P<place>[0-9a-f]{6})-")
_LIMITS = {"MemoryLimit": "memory", "PidsLimit": "processes", "CPUCfsQuota": "cores"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """A container whose agent has connected."""

    name: str
    channel: socket.socket
    folder: Path


class DockerBackend:
    """Opens containers. Its mark is their label, begins their names, and is the name of its folder."""

    def __init__(self, config: DockerConfig) -> None:
        self._config = config
        self._engine = Engine(config.url)
        self._mark = f"katcore-docker-{self._engine.place}-{secrets.token_hex(6)}"
        self._images = (config.images or home() / "images").resolve()
        self._home = home() / "docker"
        self._lock = asyncio.Lock()
        self._building: dict[Path, asyncio.Lock] = {}
        self._agent: Path | None = None
        self._num = 0
        self.has_disk_limit = True
        """Whether the engine's storage can limit it: known after the first sandbox. Each file always is."""

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """See `SandboxBackend.open`."""
        return self._open(spec)

    async def close(self) -> None:
        """See `SandboxBackend.close`."""
        try:
            if self._agent:
                await self._engine.call(self._sweep, self._mark)
        finally:
            self._engine.close()

    def capacity(self) -> Capacity:
        """See `SupportsCapacity`."""
        return capacity.of_this_machine()

    def mark(self) -> str:
        """See `SupportsReap.mark`."""
        return self._mark

    async def destroy(self, lease: Lease) -> None:
        """See `SupportsReap.destroy`."""
        was_there = await self._engine.call(self._engine.remove, lease.handle)
        self._refuse_elsewhere(lease.handle, was_there=was_there)

    async def sweep(self, holder: Holder) -> None:
        """See `SupportsReap.sweep`."""
        num = await self._engine.call(self._sweep, holder.mark)
        self._refuse_elsewhere(holder.mark, was_there=num > 0)

    def _refuse_elsewhere(self, name: str, *, was_there: bool) -> None:
        """What is not here may be gone, or with another engine."""
        found = _NAME.match(name)
        if found and not was_there and found["place"] != self._engine.place:
            raise SandboxElsewhereError(
                f"{name} was made on another machine or through another engine than {self._engine.url}: reap"
                " there, or with the DOCKER_HOST of then"
            )

    def _sweep(self, mark: str) -> int:
        found = self._engine.marked(mark)
        for name in found:
            self._engine.remove(name)
        shutil.rmtree(self._home / mark, ignore_errors=True)
        for folder in (self._home, self._images):
            for unfinished in folder.glob(f"{BUILDING}{mark}-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        return len(found)

    @asynccontextmanager
    async def _open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        if spec.snapshot:
            raise ImageMissingError(
                f"there is no snapshot {spec.snapshot}: containers have none, only local sandboxes do"
            )
        with no_room_said():
            await self._prepare()
            shape = Shape.of(spec, await self._image(spec), self._config.cpus)
        started, sandbox = await self._enter(shape, spec)
        try:
            yield sandbox
        finally:
            sandbox.close()
            await self._end(started)

    async def _enter(self, shape: Shape, spec: SandboxSpec) -> tuple[Started, DockerSandbox]:
        """A new container that serves."""
        started = await self._start(shape, spec.serves)
        grade = partial(self._grade, started, shape)
        sandbox = DockerSandbox(started.channel, self._engine, started.name, grade)
        try:
            text = frame.pack(container.hello(shape, spec))
            await asyncio.get_running_loop().sock_sendall(started.channel, text)
            await sandbox.ready()
        except BaseException:
            sandbox.close()
            await self._end(started)
            raise
        return started, sandbox

    async def _grade(self, started: Started, shape: Shape) -> socket.socket:
        """The channel of the grader of a container, which the engine starts in it."""
        if not shape.is_live:
            raise SandboxError("the sandbox was not opened to be judged while it runs")
        assert self._agent
        (started.folder / container.GRADER_SOCKET).unlink(missing_ok=True)
        command = container.connecting(self._agent, container.GRADER_SOCKET)
        user = f"{live.GRADER}:{live.GRADER}"
        with contextlib.closing(
            container.listen(started.folder, container.GRADER_SOCKET)
        ) as listener:
            await self._engine.call(self._engine.run_beside, started.name, command, user)
            while True:
                channel = await self._accept(listener, started.name)
                # Whatever runs in the container can connect as well, but not as another user.
                if container.user_of(channel) != container.user_of(started.channel):
                    break
                channel.close()
        text = frame.pack(container.hello_grader(shape))
        await asyncio.get_running_loop().sock_sendall(channel, text)
        return channel

    async def _prepare(self) -> None:
        async with self._lock:
            if self._agent is None:
                info = await self._engine.call(self._engine.info)
                self._check(info)
                self._agent = await asyncio.to_thread(bundle.make, self._home, self._mark)

    def _check(self, info: dict[str, Any]) -> None:
        if info.get("OSType", "linux") != "linux":
            raise SandboxUnavailableError(
                f"the engine at {self._engine.url} runs {info['OSType']} containers; sandboxes need Linux's"
            )
        missing = [limit for flag, limit in _LIMITS.items() if info.get(flag) is False]
        if missing:
            raise SandboxUnavailableError(
                f"the engine at {self._engine.url} cannot limit {', '.join(missing)}: let it have those"
                " cgroup controllers (a rootless engine needs cgroups v2 with delegation)"
            )

    async def _image(self, spec: SandboxSpec) -> image.Built:
        async with self._building.setdefault(spec.environment, asyncio.Lock()):
            network = self._config.network
            return await self._engine.call(
                image.build, self._engine, spec, self._images, self._mark, network
            )

    async def _start(self, shape: Shape, serves: str) -> Started:
        self._num += 1
        name = f"{self._mark}-{self._num}"
        folder = self._home / self._mark / str(self._num)
        with no_room_said(), contextlib.closing(container.listen(folder)) as listener:
            try:
                await self._create(name, shape, folder, serves)
                await self._engine.call(self._engine.start, name)
                return Started(name, await self._accept(listener, name), folder)
            except BaseException:
                await self._remove(name, folder)
                raise

    async def _create(self, name: str, shape: Shape, folder: Path, serves: str) -> None:
        assert self._agent
        mounts: dict[str, str] = {}
        if shape.image.on_host:
            mounts = await asyncio.to_thread(image.host_mounts, self._images, self._mark)
        settings = container.settings(shape, self._agent, folder, mounts)
        own = settings["HostConfig"]
        own |= {"Runtime": self._config.runtime} if self._config.runtime else {}
        labels = {MARK: self._mark, "katcore.serves": serves}
        size = {"StorageOpt": {"size": f"{shape.disk_mib}m"}} if self.has_disk_limit else {}
        try:
            await self._engine.call(
                self._engine.create, name, labels, settings | {"HostConfig": own | size}
            )
        except SandboxUnavailableError:
            raise
        except SandboxError as error:
            if size and "storage-opt" in str(error).lower():
                self._warn_of_disk()
                await self._engine.call(self._engine.create, name, labels, settings)
                return
            if "bind source path does not exist" in str(error):
                raise SandboxUnavailableError(
                    f"the engine at {self._engine.url} does not see {self._home} of this machine: {error}. It"
                    " has to be on this machine; from a container, show it that folder at the same path"
                ) from error
            raise

    def _warn_of_disk(self) -> None:
        if self.has_disk_limit:
            self.has_disk_limit = False
            _log.warning(
                "the storage of the engine at %s cannot limit the disk of a container: each file is limited"
                " to disk_mib, all together are not (overlay2 on xfs with pquota, btrfs and zfs can)",
                self._engine.url,
            )

    async def _accept(self, listener: socket.socket, name: str) -> socket.socket:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + client.START_TIMEOUT_S
        accepting = asyncio.create_task(loop.sock_accept(listener))
        try:
            while not (await asyncio.wait([accepting], timeout=_LOOK_S))[0]:
                is_running = await self._engine.call(self._engine.is_running, name)
                if accepting.done():
                    break
                if not is_running:
                    raise await self._ended(name)
                if loop.time() > until_s:
                    raise StartTimeoutError(
                        f"the container {name} was not ready within {client.START_TIMEOUT_S:g} s"
                    )
        finally:
            accepting.cancel()
        channel, _ = accepting.result()
        channel.setblocking(False)
        return channel

    async def _ended(self, name: str) -> SandboxError:
        """Why a container ended before it connected."""
        if cause := await container.cause_of(self._engine, name):
            return failure.gone(cause, "its start")
        return SandboxUnavailableError(
            f"the container {name} did not connect to {self._home}: the engine at {self._engine.url} has to"
            " be on this machine, under its kernel (no gVisor)"
        )

    async def _end(self, started: Started) -> None:
        started.channel.close()
        await self._remove(started.name, started.folder)

    async def _remove(self, name: str, folder: Path) -> None:
        try:
            await self._engine.call(self._engine.remove, name)
        finally:
            container.forget(folder)
