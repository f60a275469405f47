"""What a sandbox is to the engine: a container that can do nothing but serve its channel."""

import json
import os
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_sandboxes import capacity, failure, grading
from kat_sandboxes.client import ChannelSandbox
from kat_sandboxes.docker import bundle
from kat_sandboxes.docker.engine import Engine, binds
from kat_sandboxes.docker.image import Built
from kat_sandboxes.zygote import live
from katcore.errors import SandboxError, SandboxGoneError
from katcore.protocols import Sandbox
from katcore.schema.task import SandboxSpec

_CHANNEL = "/.kat/channel"
SOCKET, GRADER_SOCKET = "socket", "grader"
_SHARED_MEMORY_MIB = 64
_PERIOD_US = 100_000
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Shape:
    """What is settled when a container is made."""

    image: Built
    memory_mib: int
    max_processes: int
    disk_mib: int
    cpus: float
    tools: Path | None
    is_live: bool

    @classmethod
    def of(cls, spec: SandboxSpec, image: Built, most_cpus: float = 0.0) -> "Shape":
        """The shape of what a spec asks for."""
        tools = spec.tools.resolve() if spec.tools else None
        sizes = spec.memory_mib, spec.max_processes, spec.disk_mib
        return cls(image, *sizes, capacity.cores(spec, most_cpus), tools, spec.is_live)


class DockerSandbox(ChannelSandbox):
    """A container. Its commands do not pass through the engine, and go on without it."""

    def __init__(
        self,
        channel: socket.socket,
        engine: Engine,
        name: str,
        grade: Callable[[], Awaitable[socket.socket]],
    ) -> None:
        super().__init__(channel, lambda: cause_of(engine, name))
        self._engine = engine
        self._name = name
        self._grade = grade

    def handle(self) -> str:
        """See `SupportsHandle`: the container's name."""
        return self._name

    async def changes(self) -> bytes:
        """See `SupportsChanges`; the engine says which paths differ from the image."""
        try:
            listed = await self._engine.call(self._engine.changes, self._name)
        except SandboxGoneError as error:
            raise failure.gone(await cause_of(self._engine, self._name), "changes") from error
        return (await self._ask("changes", {}, json.dumps(listed).encode()))[1]

    @asynccontextmanager
    async def grader(self) -> AsyncIterator[Sandbox]:
        """See `SupportsLive`."""
        async with self.held():
            made = ChannelSandbox(await self._grade(), self._cause)
            try:
                await made.ready()
            except BaseException:
                made.close()
                raise
        try:
            yield made
        finally:
            made.close()


async def cause_of(engine: Engine, name: str) -> str:
    """What ended a container: "memory", "killed", or "" if it is not known."""
    try:
        return await engine.call(engine.cause, name)
    except SandboxError:
        return ""


def listen(folder: Path, name: str = SOCKET) -> socket.socket:
    """The socket that a container finds in its channel folder, for one connection at a time."""
    # Whatever user the container's is, it has to get in; nobody else does, since the parent is closed.
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.parent.chmod(0o700)
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        # By its descriptor: a socket's path has to be short.
        listener.bind(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)
    (folder / name).chmod(0o666)
    listener.listen(1)
    listener.setblocking(False)
    return listener


def user_of(channel: socket.socket) -> int:
    """The user at the other end, as this machine knows it."""
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def forget(folder: Path) -> None:
    """Remove a channel folder."""
    shutil.rmtree(folder, ignore_errors=True)


def hello(shape: Shape, spec: SandboxSpec) -> dict[str, Any]:
    """What the agent is told first."""
    env = _environment(shape) | ({"PYTHONDONTWRITEBYTECODE": "1"} if shape.is_live else {})
    return {"env": env, "has_door": spec.has_door, "is_grader": False, **_place(shape)}


def hello_grader(shape: Shape) -> dict[str, Any]:
    """What the grader's agent is told first."""
    env = grading.environment(_environment(shape), on_host=shape.image.on_host)
    return {"env": env, "is_grader": True, **_place(shape)}


def _environment(shape: Shape) -> dict[str, str]:
    return dict(item.split("=", 1) for item in shape.image.env if "=" in item)


def _place(shape: Shape) -> dict[str, Any]:
    return {"workdir": shape.image.workdir, "disk_mib": shape.disk_mib}


def settings(shape: Shape, agent: Path, channel: Path, mounts: dict[str, str]) -> dict[str, Any]:
    """ContainerCreate in Docker's API. `mounts`: further folders of the machine by where they are shown.

    Its file of hosts is written into `channel`.
    """
    memory = shape.memory_mib << 20
    shown = {bundle.INSIDE: str(agent), _CHANNEL: str(channel), **mounts}
    # What it names would be loaded into all programs, those of the tests too.
    shown["/etc/ld.so.preload"] = "/dev/null"
    if shape.tools:
        shown["/opt/scaffold"] = str(shape.tools)
    return {
        "Image": shape.image.tag,
        "Hostname": "sandbox",
        # Not only of mode none: Docker 20.10 locks up where one such is made while another is removed.
        "NetworkDisabled": True,
        "Entrypoint": connecting(agent, SOCKET),
        # Of the image's variables, this one would reach into the agent.
        "Env": ["LD_PRELOAD="],
        "Healthcheck": {"Test": ["NONE"]} if shape.image.has_check else None,
        "HostConfig": {
            "AutoRemove": True,
            "NetworkMode": "none",
            "IpcMode": "private",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "PidsLimit": shape.max_processes,
            "Memory": memory,
            "MemorySwap": memory,
            # Not NanoCpus: more of those than the machine has cores are an error.
            "CpuPeriod": _PERIOD_US if shape.cpus else 0,
            "CpuQuota": int(shape.cpus * _PERIOD_US),
            "ShmSize": min(_SHARED_MEMORY_MIB, shape.disk_mib) << 20,
            "LogConfig": {"Type": "none"},
            "Mounts": [*binds(shown), _own_hosts(channel)],
            "Tmpfs": _folders(shape) if shape.is_live else {},
        },
    }


def _own_hosts(channel: Path) -> dict[str, Any]:
    """The names of the loopback interface, which an engine writes down for those that have a network."""
    hosts = channel / "hosts"
    hosts.write_text("127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n")
    hosts.chmod(0o644)
    return {"Type": "bind", "Source": str(hosts), "Target": "/etc/hosts", "ReadOnly": False}


def connecting(agent: Path, name: str) -> list[str]:
    """How an agent is started in a container, to connect to this socket."""
    return bundle.command(agent, f"{_CHANNEL}/{name}")


def _folders(shape: Shape) -> dict[str, str]:
    options = f"mode=0700,uid={live.GRADER},gid={live.GRADER},size={shape.disk_mib}m"
    return dict.fromkeys(live.FOLDERS, options)
