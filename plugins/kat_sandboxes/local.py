"""The `local` backend: Linux namespaces, no daemon.

A sandbox is one process tree in its own pid, mount, network, ipc and uts namespaces (and user namespace,
where the caller is not root), over a copy-on-write root in memory, without capabilities, behind a seccomp
filter. It is forked from a warm server process, so opening one costs milliseconds. Where the machine cannot
isolate, opening fails; nothing ever runs unisolated instead.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import platform
import secrets
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kat_sandboxes import capacity, grading, host, reap
from kat_sandboxes.client import START_TIMEOUT_S, ChannelSandbox
from kat_sandboxes.failure import no_room_said
from katcore.config import home
from katcore.errors import (
    ImageMissingError,
    SandboxElsewhereError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
)
from katcore.protocols import Sandbox
from katcore.sandbox.image import Image, ImageStore
from katcore.sandbox.process import Process
from katcore.schema.capacity import Capacity
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec

_LOG = logging.getLogger(__name__)
_BUSY_S = 0.002
_REMEDY = "; see docs/how-to/sandboxes.md, Limits"
_PLAIN = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
}
"""The environment in an image that brings its own programs."""
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from kat_sandboxes.zygote.server import main; main()"


class LocalConfig(BaseModel):
    """Options of the local backend. `images`: the image store; `scaffolds`: where they are installed.

    Both are in katcore's home by default. `cpus` bounds the cores of one sandbox (0: no bound).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Path | None = None
    scaffolds: Path | None = None
    cpus: float = Field(default=0.0, ge=0)


class LocalSandbox(ChannelSandbox):
    """A sandbox whose handle is its first process.

    Its files are what others can start from, and it can be graded while it runs.
    """

    def __init__(
        self,
        channel: socket.socket,
        cause: Callable[[], Awaitable[str]],
        keep: Callable[[bytes], contextlib.AbstractAsyncContextManager[str]],
        grade: Callable[[socket.socket], Awaitable[None]],
    ) -> None:
        super().__init__(channel, cause)
        self._keep = keep
        self._grade = grade
        self._machine: Process | None = None

    async def ready(self) -> None:
        """Wait until the machine is set up."""
        await super().ready()
        self._machine = _process(self.sender)

    def handle(self) -> str:
        """See `SupportsHandle`: its first process."""
        return str(self._machine)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[str]:
        """See `SupportsSnapshot`: a layer on disk, on top of those of its image."""
        async with self._keep(await self.changes()) as name:
            yield name

    @asynccontextmanager
    async def grader(self) -> AsyncIterator[Sandbox]:
        """See `SupportsLive`."""
        with no_room_said():
            mine, theirs = socket.socketpair()
        made = ChannelSandbox(mine, self._cause)
        try:
            async with self.held():
                with theirs:
                    await self._grade(theirs)
                await made.ready()
            yield made
        finally:
            made.close()


class LocalBackend:
    """Opens sandboxes on this machine. Its mark names its cgroups, and is on its server's command line."""

    def __init__(self, config: LocalConfig) -> None:
        self._mark = f"katcore-{secrets.token_hex(6)}"
        self._images = (config.images or home() / "images").resolve()
        self._store = ImageStore(self._images, self._mark)
        self._scaffolds = (config.scaffolds or home() / "scaffolds").resolve()
        self._cpus = config.cpus
        self._start_lock = asyncio.Lock()
        self._end_lock = asyncio.Lock()
        self._build_lock = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._bases: dict[bool, str] = {}
        self._snapshots: dict[str, Image] = {}
        self._ids = itertools.count()
        self._unsaid = {"limits", "cpus"}
        self.limits = "none"
        """Which cgroups hold sandboxes to their limits: "v2", "v1", or "none"."""
        self.has_cpu_limit = False

    def open(self, spec: SandboxSpec) -> contextlib.AbstractAsyncContextManager[Sandbox]:
        """See `SandboxBackend.open`."""
        return self._open(spec)

    async def close(self) -> None:
        """End the server; the kernel ends all that it forked."""
        if self._requests:
            self._requests.close()
            self._requests = None
        if self._process:
            try:
                await asyncio.to_thread(self._process.wait, 10)
            except subprocess.TimeoutExpired:
                await asyncio.to_thread(reap.sweep, self._mark, self._images)
                self._process.wait()
            self._process = None

    def capacity(self) -> Capacity:
        """See `SupportsCapacity`."""
        return capacity.of_this_machine()

    def mark(self) -> str:
        """See `SupportsReap.mark`."""
        return self._mark

    async def destroy(self, lease: Lease) -> None:
        """See `SupportsReap.destroy`. With its first process, the kernel ends all of a sandbox."""
        process = Process.parse(lease.handle)
        if not process.is_here:
            raise SandboxElsewhereError(
                f"{lease.id} is or was on another machine, or in a container"
            )
        await asyncio.to_thread(process.kill)

    async def sweep(self, holder: Holder) -> None:
        """See `SupportsReap.sweep`."""
        if holder.host != platform.node() and not Process.parse(holder.process).is_here:
            raise SandboxElsewhereError(f"only a process on {holder.host} can see what is left")
        await asyncio.to_thread(reap.sweep, holder.mark, self._images)

    @asynccontextmanager
    async def _open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        if spec.is_live and os.geteuid():
            raise SandboxUnavailableError(
                "live grading takes a second user, and an ordinary user's namespaces have one: run as root,"
                " or use the docker backend"
            )
        with no_room_said():
            await self._start()
            image = await self._start_image(spec)
        async with self._machine(spec, image) as sandbox:
            yield sandbox

    @asynccontextmanager
    async def _machine(self, spec: SandboxSpec, image: Image) -> AsyncIterator[LocalSandbox]:
        identifier = next(self._ids)
        with no_room_said():
            mine, theirs = socket.socketpair()
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        request = {
            "id": identifier,
            "layers": [*map(str, self._store.folders(image)), self._bases[image.is_whole]],
            "env": (_PLAIN if image.is_whole else _environment()) | image.env | _live(spec),
            "workdir": image.workdir,
            "limits": self._limits(spec),
            "disk_mib": spec.disk_mib,
            "tools": self._tools(spec),
            "has_door": spec.has_door,
            "is_live": spec.is_live,
        }
        if image.is_whole:
            request["shared"] = ["/dev"]
        sandbox = LocalSandbox(
            mine,
            lambda: self._end(identifier),
            partial(self._keep, image),
            partial(self._grade, identifier, spec, image),
        )
        try:
            with theirs:
                await self._send(json.dumps(request).encode(), [theirs.fileno()])
            await sandbox.ready()
            yield sandbox
        finally:
            sandbox.close()
            await asyncio.shield(self._end(identifier))

    async def _grade(
        self, identifier: int, spec: SandboxSpec, image: Image, channel: socket.socket
    ) -> None:
        """Have the server start the grader of a sandbox at this end of a channel."""
        if not spec.is_live:
            raise SandboxError("the sandbox was not opened to be judged while it runs")
        request = {
            "grades": identifier,
            "env": grading.environment(image.env, on_host=not image.is_whole),
            "workdir": image.workdir,
            "disk_mib": spec.disk_mib,
        }
        await self._send(json.dumps(request).encode(), [channel.fileno()])

    def _limits(self, spec: SandboxSpec) -> dict[str, float]:
        cpus = capacity.cores(spec, self._cpus)
        if cpus and not self.has_cpu_limit:
            self._say("cpus", f"sandboxes are not held to {cpus:g} cores here{_REMEDY}")
        return {
            "memory_mib": spec.memory_mib,
            "max_processes": spec.max_processes,
            "cpus": cpus,
        }

    def _say(self, what: str, text: str) -> None:
        """Once."""
        if what in self._unsaid:
            self._unsaid.remove(what)
            _LOG.warning(text)

    def _tools(self, spec: SandboxSpec) -> str:
        """The scaffold's folder as the server sees it."""
        if spec.tools is None:
            return ""
        tools = spec.tools.resolve()
        if not tools.is_relative_to(self._scaffolds):
            raise SandboxError(f"{tools}: scaffolds are shown from {self._scaffolds} alone")
        return str(tools)

    async def _end(self, identifier: int) -> str:
        """End a sandbox; what had ended it before, "memory" or "killed", if it is known."""
        async with self._end_lock:
            if self._requests is None:
                return ""
            try:
                await self._send(json.dumps({"id": identifier}).encode(), [])
                answer = await asyncio.get_running_loop().sock_recv(self._requests, 1024)
            except (OSError, SandboxError):
                return ""
            return str(json.loads(answer or b'{"cause": ""}')["cause"])

    async def _send(self, data: bytes, descriptors: list[int]) -> None:
        while True:
            if self._requests is None:
                raise SandboxGoneError("the backend is closed")
            try:
                socket.send_fds(self._requests, [data], descriptors)
            except BlockingIOError:  # the server has as many requests before it as the kernel keeps
                await asyncio.sleep(_BUSY_S)
            except OSError as error:
                raise SandboxError(f"the sandbox server is gone: {error}") from error
            else:
                return

    @asynccontextmanager
    async def _keep(self, image: Image, changes: bytes) -> AsyncIterator[str]:
        name = f"{reap.SNAPSHOT}{self._mark}-{next(self._ids)}"
        with no_room_said():
            made = await asyncio.to_thread(self._store.snapshot, image, name, changes)
        self._snapshots[name] = made
        try:
            yield name
        finally:
            del self._snapshots[name]
            await asyncio.to_thread(self._store.drop, made)

    async def _start_image(self, spec: SandboxSpec) -> Image:
        if not spec.snapshot:
            return await self._image(spec)
        if spec.snapshot not in self._snapshots:
            raise ImageMissingError(f"there is no snapshot {spec.snapshot} any more")
        return self._snapshots[spec.snapshot]

    async def _image(self, spec: SandboxSpec) -> Image:
        loop = asyncio.get_running_loop()

        def run(image: Image, command: str) -> bytes:
            return asyncio.run_coroutine_threadsafe(self._run(image, command), loop).result()

        async with self._build_lock:
            return await asyncio.to_thread(
                self._store.image, spec.environment, run=run, keeps_history=spec.keeps_history
            )

    async def _run(self, image: Image, command: str) -> bytes:
        spec = SandboxSpec(Path(), memory_mib=2048, disk_mib=2048)
        async with self._machine(spec, image) as sandbox:
            shell = "sh" if image.is_whole else "bash"
            result = await sandbox.exec([shell, "-c", command], timeout_s=600)
            if result.exit_code:
                output = (result.stdout + result.stderr)[-500:].decode(errors="replace")
                raise SandboxError(
                    f"RUN {command[:200]!r} exited with {result.exit_code}: {output}"
                )
            return await sandbox.changes()

    async def _start(self) -> None:
        async with self._start_lock:
            if self._process and self._process.poll() is not None:
                async with self._end_lock:
                    await self.close()
            if self._process is None:
                await asyncio.to_thread(self._launch)
                assert self._requests
                self._requests.setblocking(False)

    def _launch(self) -> None:
        if platform.system() != "Linux":
            raise SandboxUnavailableError(
                f"local sandboxes need Linux namespaces, and this is {platform.system()};"
                " use a Linux machine or container"
            )
        self._bases = {
            False: str(host.base_layer(self._images, self._mark)),
            True: str(host.root_layer(self._images, self._mark)),
        }
        requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        source = str(Path(__file__).resolve().parents[1])
        with theirs:
            self._process = subprocess.Popen(
                [str(host.interpreter()), "-S", "-c", _BOOT, source, self._mark],
                stdin=theirs.fileno(),
                env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        requests.settimeout(START_TIMEOUT_S)
        requests.send(json.dumps(self._settings()).encode())
        answer = json.loads(requests.recv(1 << 16) or b'{"error": "it ended at once"}')
        if "error" in answer:
            self._process.wait()
            self._process = None
            raise SandboxUnavailableError(
                f"this machine cannot isolate sandboxes: {answer['error']}. Local sandboxes need root, or"
                " user namespaces for ordinary users (sysctl kernel.unprivileged_userns_clone=1)"
            )
        self._requests = requests
        self.limits, self.has_cpu_limit = answer["limits"], answer["has_cpu"]
        if answer["note"]:
            self._say("limits", f"sandboxes are not held to limits here: {answer['note']}{_REMEDY}")

    def _settings(self) -> dict[str, Any]:
        tools = host.tools(self._images, self._mark)
        binds = {folder: folder for folder in host.shared_folders()}
        binds |= {folder: str(tools / "empty") for folder in host.masked_folders()}
        layers = str(self._images / "layers")
        self._scaffolds.mkdir(parents=True, exist_ok=True)
        binds |= {host.TOOLS: str(tools), layers: layers}
        binds |= {str(self._scaffolds): str(self._scaffolds)}
        root = self._images / "root"
        root.mkdir(exist_ok=True)
        return {
            "name": self._mark,
            "root": str(root),
            "binds": binds,
            "links": host.links(),
            "shared": [*host.shared_folders(), host.TOOLS, "/dev"],
            "interpreter": host.import_path(),
            "overlay": ",userxattr" if os.geteuid() else "",
        }


def _process(pid: int) -> Process:
    try:
        return Process.of(pid)
    except ProcessLookupError as error:
        raise SandboxGoneError("the sandbox died as soon as it was there") from error


def _live(spec: SandboxSpec) -> dict[str, str]:
    """Python writes nothing beside an image's modules, where whatever is new is a sign of cheating."""
    return {"PYTHONDONTWRITEBYTECODE": "1"} if spec.is_live else {}


def _environment() -> dict[str, str]:
    folders = [
        f"{host.TOOLS}/bin",
        str(host.interpreter().parent),
        "/usr/local/bin",
        "/usr/bin",
        "/bin",
    ]
    return {
        "PATH": ":".join(folders),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
