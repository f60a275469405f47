"""The `local` backend: Linux namespaces, no daemon.

A sandbox is one process tree in its own pid, mount, network, ipc and uts namespaces (and user namespace,
where the caller is not root), over a copy-on-write root in memory, without capabilities, behind a seccomp
filter. It is forked from a warm server process, so opening one costs milliseconds. Where the machine cannot
isolate, opening fails; nothing ever runs unisolated instead.
"""

import asyncio
import contextlib
import errno
import itertools
import json
import os
import platform
import secrets
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kat_sandboxes import capacity, host, reap
from kat_sandboxes.zygote import frame
from katcore.config import home
from katcore.errors import (
    EvictedError,
    ImageMissingError,
    NoCapacityError,
    OutOfDiskError,
    OutOfMemoryError,
    SandboxElsewhereError,
    SandboxError,
    SandboxGoneError,
    SandboxTimeoutError,
    SandboxUnavailableError,
    StartTimeoutError,
)
from katcore.protocols import Sandbox
from katcore.sandbox.image import Image, ImageStore
from katcore.sandbox.process import Process
from katcore.schema.capacity import Capacity
from katcore.schema.lease import Holder, Lease
from katcore.schema.rollout import ExecResult
from katcore.schema.task import SandboxSpec

_START_TIMEOUT_S = 60.0
_BUSY_S = 0.002
_NO_ROOM = {errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EUSERS}
"""What the kernel says if processes, memory, namespaces, mounts or descriptors are used up."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PLAIN = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
}
"""The environment in an image that brings its own programs."""
_DOOR, _SENDER = struct.Struct("i"), struct.Struct("3i")
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from kat_sandboxes.zygote.server import main; main()"


class LocalConfig(BaseModel):
    """Options of the local backend. `images`: the image store; `scaffolds`: where they are installed.

    Both are in katcore's home by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: Path | None = None
    scaffolds: Path | None = None


class LocalSandbox:
    """One open sandbox. Requests are served one at a time."""

    def __init__(
        self,
        channel: socket.socket,
        end: Callable[[], Awaitable[str]],
        keep: Callable[[bytes], contextlib.AbstractAsyncContextManager[str]],
    ) -> None:
        self._channel = channel
        self._end = end
        self._keep = keep
        self._door: socket.socket | None = None
        self._machine: Process | None = None
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ready(self) -> None:
        """Wait until the machine is set up."""
        self._channel.setblocking(False)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                data = await self._first()
                self._reader, self._writer = await asyncio.open_connection(sock=self._channel)
                self._reader.feed_data(data)
                head, _ = await self._receive()
        except TimeoutError as error:
            raise StartTimeoutError(
                f"the sandbox was not ready within {_START_TIMEOUT_S:g} s"
            ) from error
        except asyncio.IncompleteReadError as error:
            raise await self._why("its start") from error
        if "error" in head:
            raise _setup_failed(head)

    async def _first(self) -> bytes:
        """The beginning of the first message. With it come its sender's pid, and the door if there is one."""
        loop = asyncio.get_running_loop()
        readable = loop.create_future()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(self._channel, wake)
        try:
            await readable
        finally:
            loop.remove_reader(self._channel)
        room = sum(socket.CMSG_SPACE(item.size) for item in (_DOOR, _SENDER))
        data, attached, _, _ = self._channel.recvmsg(1 << 16, room)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        for _, kind, content in attached:
            if kind == socket.SCM_RIGHTS:
                self._door = socket.socket(fileno=_DOOR.unpack(content)[0])
            elif data:
                self._machine = _process(_SENDER.unpack(content)[0])
        return data

    def handle(self) -> str:
        """See `SupportsHandle`: its first process."""
        return str(self._machine)

    def door(self) -> tuple[socket.socket, str]:
        """See `SupportsDoor`."""
        door, self._door = self._door, None
        if door is None:
            raise SandboxError("the sandbox was opened without a door, or it is taken")
        return door, f"http://127.0.0.1:{frame.DOOR}"

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> ExecResult:
        """See `Sandbox.exec`. Output beyond 1 MiB per stream is dropped, and the result says so.

        Cancelled, it kills the command and all that it started.
        """
        request = {"argv": list(argv), "cwd": cwd, "env": dict(env or {}), "timeout_s": timeout_s}
        head, body = await self._ask("exec", request, timeout_s=timeout_s)
        if head.get("error") == "timeout":
            raise SandboxTimeoutError(f"{argv[0]}: ran past its {timeout_s:g} s; all is killed")
        split = head["stdout"]
        return ExecResult(head["code"], body[:split], body[split:], head["truncated"])

    async def read(self, path: str) -> bytes:
        """See `Sandbox.read`."""
        return (await self._ask("read", {"path": path}))[1]

    async def write(self, path: str, data: bytes) -> None:
        """See `Sandbox.write`."""
        await self._ask("write", {"path": path}, data)

    async def changes(self) -> bytes:
        """See `SupportsChanges`: a tar archive; deleted paths carry a pax header."""
        return (await self._ask("changes", {}))[1]

    async def apply(self, changes: bytes) -> None:
        """See `SupportsChanges`."""
        await self._ask("apply", {}, changes)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[str]:
        """See `SupportsSnapshot`: a layer on disk, on top of those of its image."""
        async with self._keep(await self.changes()) as name:
            yield name

    def close(self) -> None:
        """Let go of the channel; the machine ends at its end of stream."""
        if self._writer:
            self._writer.transport.abort()
        if self._door:
            self._door.close()
        self._channel.close()

    async def _ask(
        self, do: str, head: dict[str, Any], body: bytes = b"", *, timeout_s: float = 60.0
    ) -> tuple[dict[str, Any], bytes]:
        """Ask and wait. One that is cancelled is still answered, before the next is asked."""
        await self._lock.acquire()
        if self._writer is None:
            self._lock.release()
            raise SandboxGoneError("the sandbox is not open")
        self._writer.write(frame.pack({"do": do, **head}, body))
        exchange = asyncio.create_task(self._exchange(do, timeout_s + 30))
        exchange.add_done_callback(self._exchanged)
        try:
            reply = await asyncio.shield(exchange)
        except asyncio.CancelledError:
            if do == "exec":
                self._writer.write(frame.pack({"do": "kill"}))
            raise
        if reply[0].get("error") == "os":
            if do != "read" and reply[0]["errno"] in _FULL:
                raise OutOfDiskError(f"{do}: {reply[0]['reason']}")
            raise OSError(reply[0]["errno"], reply[0]["reason"])
        if reply[0].get("error") == "value":
            raise ValueError(reply[0]["reason"])
        if reply[0].get("error") == "setup":
            raise SandboxGoneError(f"the sandbox failed: {reply[0]['reason']}")
        return reply

    def _exchanged(self, exchange: "asyncio.Task[tuple[dict[str, Any], bytes]]") -> None:
        self._lock.release()
        if not exchange.cancelled():
            exchange.exception()

    async def _exchange(self, do: str, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        assert self._writer
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()
                return await self._receive()
        except TimeoutError as error:
            raise SandboxGoneError(f"the sandbox did not answer within {timeout_s:g} s") from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise await self._why(do) from error

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._reader
        lengths = frame.lengths(await self._reader.readexactly(frame.HEADER_BYTES))
        head = json.loads(await self._reader.readexactly(lengths[0]))
        return head, await self._reader.readexactly(lengths[1])

    async def _why(self, do: str) -> SandboxGoneError:
        """What became of a machine that does not answer any more."""
        cause = await self._end()
        if cause == "memory":
            return OutOfMemoryError(f"the sandbox ran out of memory during {do}; raise its limit")
        if cause == "killed":
            return EvictedError(f"the sandbox was killed from outside during {do}")
        return SandboxGoneError(f"the sandbox died during {do}")


class LocalBackend:
    """Opens sandboxes on this machine. Its mark names its cgroups, and is on its server's command line."""

    def __init__(self, config: LocalConfig) -> None:
        self._mark = f"katcore-{secrets.token_hex(6)}"
        self._images = (config.images or home() / "images").resolve()
        self._store = ImageStore(self._images, self._mark)
        self._scaffolds = (config.scaffolds or home() / "scaffolds").resolve()
        self._start_lock = asyncio.Lock()
        self._end_lock = asyncio.Lock()
        self._build_lock = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._bases: dict[bool, str] = {}
        self._snapshots: dict[str, Image] = {}
        self._ids = itertools.count()
        self.limits = "none"

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
        with _no_room_said():
            await self._start()
            image = await self._start_image(spec)
        async with self._machine(spec, image) as sandbox:
            yield sandbox

    @asynccontextmanager
    async def _machine(self, spec: SandboxSpec, image: Image) -> AsyncIterator[LocalSandbox]:
        identifier = next(self._ids)
        with _no_room_said():
            mine, theirs = socket.socketpair()
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        request = {
            "id": identifier,
            "layers": [*map(str, self._store.folders(image)), self._bases[image.is_whole]],
            "env": (_PLAIN if image.is_whole else _environment()) | image.env,
            "workdir": image.workdir,
            "memory_mib": spec.memory_mib,
            "max_processes": spec.max_processes,
            "disk_mib": spec.disk_mib,
            "tools": self._tools(spec),
            "has_door": spec.has_door,
        }
        if image.is_whole:
            request["shared"] = ["/dev"]
        sandbox = LocalSandbox(mine, lambda: self._end(identifier), partial(self._keep, image))
        try:
            with theirs:
                await self._send(json.dumps(request).encode(), [theirs.fileno()])
            await sandbox.ready()
            yield sandbox
        finally:
            sandbox.close()
            await asyncio.shield(self._end(identifier))

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
        with _no_room_said():
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
        requests.settimeout(_START_TIMEOUT_S)
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
        self.limits = answer["limits"]

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


def _setup_failed(head: dict[str, Any]) -> SandboxError:
    if head["errno"] in _NO_ROOM:
        return NoCapacityError(f"this machine has no room for another sandbox: {head['reason']}")
    return SandboxUnavailableError(f"the sandbox could not be set up: {head['reason']}")


@contextlib.contextmanager
def _no_room_said() -> Iterator[None]:
    """While the host prepares a sandbox: its disk may be full, or its descriptors used up."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutOfDiskError(f"no image can be made: {error}") from error
        if error.errno in _NO_ROOM:
            raise NoCapacityError(f"this machine has no room for a sandbox: {error}") from error
        raise


def _process(pid: int) -> Process:
    try:
        return Process.of(pid)
    except ProcessLookupError as error:
        raise SandboxGoneError("the sandbox died as soon as it was there") from error


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
