"""Serves the requests of a sandbox's backend, as its pid 1, until end of stream.

Nothing that runs in the sandbox can look into this process (it is not dumpable) or signal it (it is pid 1).
"""

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kat_sandboxes.zygote import files, frame, kernel, live, seccomp, warm

OUTPUT_LIMIT = 1 << 20
_LOOK_S, _PATIENCE_S = 0.005, 10.0
_FILTER = seccomp.program()
_DEFAULT = (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that Python or the server ignores, and programs do not."""


def doors(spec: dict[str, Any]) -> list[socket.socket]:
    """The listening socket of the door, if there is to be one."""
    has_door = spec["has_door"]
    return [socket.create_server(("127.0.0.1", frame.DOOR), backlog=64)] if has_door else []


def limit(disk_mib: int) -> None:
    """What the kernel limits per process: core files, open files, the size of a file."""
    for name, most in (("CORE", 0), ("NOFILE", 1024), ("FSIZE", disk_mib << 20)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def lock() -> None:
    """Hide this process from the sandbox, and deny it and all that it starts the dangerous system calls."""
    kernel.set_dumpable(is_dumpable=False)
    kernel.install_filter(_FILTER)


def serve_as_grader(channel: socket.socket, spec: dict[str, Any]) -> None:
    """Until end of stream, in the sandbox of another process. What it starts, it reaps.

    Raises:
        PermissionError: its folders are not its own.
    """
    kernel.become_subreaper()
    lock()
    live.check_folders()
    served = Machine(channel, spec, lambda _: b"")
    channel.sendall(frame.pack({"ok": True}))
    served.serve()


@dataclass
class _Command:
    """One running command and what it said so far."""

    pid: int
    pipes: dict[int, int]
    deadline: float
    output: dict[int, bytearray] = field(default_factory=lambda: {1: bytearray(), 2: bytearray()})
    is_truncated: bool = False

    def drain(self, pipe: int) -> None:
        """Take what is in a pipe; at its end, forget it."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data = os.read(pipe, 1 << 16)
                if not data:
                    os.close(pipe)
                    del self.pipes[pipe]
                    return
                kept = self.output[self.pipes[pipe]]
                room = OUTPUT_LIMIT - len(kept)
                self.is_truncated |= len(data) > room
                kept += data[:room]


class Machine:
    """Serves one request at a time; between and meanwhile, Python commands from inside, if it has `python`.

    `spec` has `env` and `workdir`. `changes` is given the body of the request.
    """

    def __init__(
        self,
        channel: socket.socket,
        spec: dict[str, Any],
        changes: Callable[[bytes], bytes],
        python: warm.Python | None = None,
    ) -> None:
        self._channel = channel
        self._env: dict[str, str] = spec["env"]
        self._workdir: str = spec["workdir"]
        self._changes = changes
        self._command: _Command | None = None
        self._python = python
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Until the other end closes."""
        while True:
            command = self._command
            watched: list[Any] = [self._wake, self._channel]
            watched += self._python.watched() if self._python else []
            watched += list(command.pipes) if command else []
            timeout = max(0.0, command.deadline - time.monotonic()) if command else None
            ready = select.select(watched, (), (), timeout)[0]
            if self._wake in ready:
                os.read(self._wake, 4096)
            if command:
                for pipe in [pipe for pipe in command.pipes if pipe in ready]:
                    command.drain(pipe)
            for item in ready:
                if self._python and isinstance(item, socket.socket) and item is not self._channel:
                    self._python.handle(item)
            self._reap()
            if self._command and time.monotonic() >= self._command.deadline:
                self._end(timed_out=True)
            if self._channel in ready and not self._request():
                return

    def close(self) -> None:
        """Let go of what tells it that a child has ended."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._wake)
        os.close(self._woken)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                code = os.waitstatus_to_exitcode(status)
                code = code if code >= 0 else 128 - code
                self._exited(pid, code)
                if self._command and pid == self._command.pid:
                    self._end(code=code)

    def _end(self, *, code: int = 0, timed_out: bool = False) -> None:
        command, self._command = self._command, None
        assert command
        if timed_out:
            self._kill_all()
        for pipe in list(command.pipes):
            command.drain(pipe)
        for pipe in command.pipes:
            os.close(pipe)
        head: dict[str, Any] = {"error": "timeout"} if timed_out else {"code": code}
        stdout, stderr = bytes(command.output[1]), bytes(command.output[2])
        head |= {"stdout": len(stdout), "truncated": command.is_truncated}
        self._channel.sendall(frame.pack(head, stdout + stderr))

    def _kill_all(self) -> None:
        """Returns when nothing is left, so that what comes next has the whole process limit."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                self._exited(os.waitpid(-1, 0)[0], 128 + signal.SIGKILL)

    def _exited(self, pid: int, code: int) -> None:
        if self._python:
            self._python.exited(pid, code)

    def _request(self) -> bool:
        message = frame.receive(self._channel)
        if message is None:
            return False
        head, body = message
        try:
            reply = getattr(self, f"_do_{head['do']}")(head, body)
        except OSError as error:
            reply = frame.pack({"error": "os", "errno": error.errno, "reason": str(error)})
        except ValueError as error:
            reply = frame.pack({"error": "value", "reason": str(error)})
        if reply:
            self._channel.sendall(reply)
        return True

    def _do_kill(self, head: dict[str, Any], body: bytes) -> bytes:
        """The only request that may come while a command runs; it answers that one's."""
        if self._command:
            self._end(timed_out=True)
        return b""

    def _do_exec(self, head: dict[str, Any], body: bytes) -> bytes:
        pipes = {}
        ends = []
        for number in (1, 2):
            mine, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(theirs, True)
            pipes[mine] = number
            ends.append(theirs)
        env = self._env | head["env"]
        try:
            os.chdir(head["cwd"] or self._workdir)
            pid = _spawn(head["argv"], env, ends)
        except (OSError, ValueError) as error:
            for pipe in pipes:
                os.close(pipe)
            if isinstance(error, ValueError):
                raise
            what = error.filename or head["argv"][0]
            reason = f"{what}: {error.strerror}\n".encode(errors="surrogateescape")
            code = 127 if isinstance(error, FileNotFoundError) else 126
            return frame.pack({"code": code, "stdout": 0, "truncated": False}, reason)
        finally:
            os.chdir("/")
            for end in ends:
                os.close(end)
        self._command = _Command(pid, pipes, time.monotonic() + head["timeout_s"])
        return b""

    def _do_read(self, head: dict[str, Any], body: bytes) -> bytes:
        with open(head["path"], "rb", opener=_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, f"{head['path']}: not a regular file")
            return frame.pack({"ok": True}, file.read())

    def _do_write(self, head: dict[str, Any], body: bytes) -> bytes:
        try:
            os.makedirs(os.path.dirname(head["path"]) or "/", exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(
                errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename
            ) from None
        with open(head["path"], "wb", opener=_at_once) as file:
            file.write(body)
        return frame.pack({"ok": True})

    def _do_changes(self, head: dict[str, Any], body: bytes) -> bytes:
        return frame.pack({"ok": True}, self._changes(body))

    def _do_settle(self, head: dict[str, Any], body: bytes) -> bytes:
        until_s = time.monotonic() + head["grace_s"]
        while live.strays(head["services"]) and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
            self._reap()
        ended = live.end(head["services"])
        until_s = time.monotonic() + _PATIENCE_S
        while any(map(live.is_alive, ended)) and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
            self._reap()
        return frame.pack({"ok": True, "ended": sorted(set(ended.values()))})

    def _do_hold(self, head: dict[str, Any], body: bytes) -> bytes:
        live.hold()
        return frame.pack({"ok": True})

    def _do_go_on(self, head: dict[str, Any], body: bytes) -> bytes:
        live.go_on()
        return frame.pack({"ok": True})

    def _do_apply(self, head: dict[str, Any], body: bytes) -> bytes:
        files.apply(body)
        return frame.pack({"ok": True})


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _spawn(argv: list[str], env: dict[str, str], outputs: list[int]) -> int:
    """Start a command in this folder and a session of its own. `subprocess` writes to 0.3 MiB for it."""
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(outputs, 1)]
    return os.posix_spawn(
        _which(argv[0], env), argv, env, file_actions=actions, setsid=True, setsigdef=_DEFAULT
    )


def _which(program: str, env: dict[str, str]) -> str:
    if "/" in program:
        return program
    for folder in env.get("PATH", "/usr/bin:/bin").split(":"):
        path = os.path.join(folder, program)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return program
