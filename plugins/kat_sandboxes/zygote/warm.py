"""`python3` inside a sandbox, without the price of starting Python.

The sandbox's `python3` is a shell script (`CLIENT`) that connects to pid 1 and names itself. Pid 1, which has
pytest and the common modules imported already, forks; the child takes over the client's open files, working
folder, environment and arguments, and runs. Options that would change how the interpreter starts (-O, -X, -I,
...) are answered with `exec`: the client then becomes the real interpreter.

The client lends copies of its open files, 6 to 8: while bash writes to its connection, its own 1 is that.
"""

import atexit
import contextlib
import errno
import gc
import os
import random
import runpy
import signal
import socket
import sys
import threading
import types
from typing import Any, Protocol

from kat_sandboxes.zygote import kernel

PORT = 7
"""On the sandbox's own loopback, which nobody else can reach."""

_LENT = 6
_MAX_CLIENTS, _MAX_REQUEST = 256, 4 << 20

CLIENT = f"""#!/bin/bash
exec 8>&2 2>/dev/null
exec 6<&0; exec 7>&1
exec 9<>/dev/tcp/127.0.0.1/{PORT} || exec %s "$@" 2>&8 6<&- 7>&- 8>&-
exec 2>&8
printf '%%s\\0' "$$" "$#" "$@" >&9
read -r -u 9 code
[ "$code" = exec ] && exec %s "$@" 6<&- 7>&- 8>&- 9>&-
exit "${{code:-137}}"
"""

PRELOADED = (
    "argparse", "ast", "base64", "bisect", "collections", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "doctest", "enum", "fractions", "functools", "glob",
    "gzip", "hashlib", "heapq", "html", "inspect", "itertools", "json", "logging", "math", "operator",
    "pathlib", "pickle", "pprint", "queue", "random", "re", "shlex", "shutil", "sqlite3", "statistics",
    "string", "struct", "subprocess", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize",
    "traceback", "types", "typing", "unicodedata", "unittest", "unittest.mock", "urllib.parse", "uuid",
    "warnings", "weakref", "xml.etree.ElementTree", "zipfile", "zoneinfo", "importlib.metadata",
    "pytest", "_pytest.assertion.rewrite", "_pytest.cacheprovider", "_pytest.capture", "_pytest.config",
    "_pytest.doctest", "_pytest.fixtures", "_pytest.junitxml", "_pytest.main", "_pytest.mark",
    "_pytest.monkeypatch", "_pytest.pastebin", "_pytest.python", "_pytest.reports", "_pytest.runner",
    "_pytest.skipping", "_pytest.terminal", "_pytest.tmpdir", "_pytest.unittest", "_pytest.warnings",
    "_pytest.debugging", "_pytest.faulthandler", "_pytest.legacypath", "_pytest.logging", "_pytest.nodes",
    "_pytest.pytester", "_pytest.python_api", "_pytest.python_path", "_pytest.recwarn", "_pytest.setuponly",
    "_pytest.setupplan", "_pytest.stepwise", "_pytest.threadexception", "_pytest.unraisableexception",
    "_pytest.helpconfig", "_pytest.compat", "_pytest._code",
)  # fmt: skip


class Closable(Protocol):
    """Something a child of pid 1 must not keep."""

    def close(self) -> None:
        """Let go."""


class Python:
    """The Python commands of one sandbox: who waits, and for which child."""

    def __init__(
        self, listener: socket.socket, private: tuple[Closable, ...], interpreter: tuple[str, ...]
    ) -> None:
        self._listener = listener
        self._private = private
        self._path = list(interpreter)
        self._waiting: dict[socket.socket, bytearray] = {}
        self._running: dict[int, socket.socket] = {}

    def watched(self) -> list[socket.socket]:
        """Sockets on which something may happen."""
        return [self._listener, *self._waiting, *self._running.values()]

    def handle(self, ready: socket.socket) -> None:
        """A client came, said something, or left."""
        if ready is self._listener:
            self._accept()
            return
        pid = next((pid for pid, client in self._running.items() if client is ready), None)
        if pid is not None:
            self._left(pid)
            return
        data = self._waiting.get(ready)
        if data is None:
            return
        try:
            piece = ready.recv(1 << 16)
            data += piece
            words = bytes(data).split(b"\0")[:-1]
            is_whole = len(words) >= 2 and len(words) >= 2 + int(words[1])
            if piece and not is_whole and len(data) < _MAX_REQUEST:
                return
            del self._waiting[ready]
            if is_whole:
                self._start(ready, int(words[0]), [os.fsdecode(word) for word in words[2:]])
            else:
                ready.close()
        except (OSError, ValueError):  # it left, or is no client of ours, or no process can be had
            self._waiting.pop(ready, None)
            ready.close()

    def exited(self, pid: int, code: int) -> None:
        """Tell the client, if `pid` ran for one."""
        client = self._running.pop(pid, None)
        if client:
            with contextlib.suppress(OSError):
                client.sendall(b"%d\n" % code)
            client.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client = self._listener.accept()[0]
            if len(self._waiting) + len(self._running) < _MAX_CLIENTS:
                client.setblocking(True)
                self._waiting[client] = bytearray()
            else:
                client.close()

    def _left(self, pid: int) -> None:
        self._running.pop(pid).close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _start(self, client: socket.socket, caller: int, arguments: list[str]) -> None:
        if arguments and arguments[0].startswith("-") and arguments[0] not in {"-m", "-c", "-"}:
            client.sendall(b"exec\n")
            client.close()
            return
        pid = os.fork()
        if pid == 0:
            _become(caller, arguments, self._path, [*self._private, client, *self.watched()])
        self._running[pid] = client


def _become(caller: int, arguments: list[str], path: list[str], private: list[Closable]) -> None:
    """In the child: be the interpreter that the caller asked for. Never returns."""
    code: int = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in range(3):
            borrowed = _borrow(caller, _LENT + number)
            os.dup2(borrowed, number, inheritable=True)
            os.close(borrowed)
        os.chdir(f"/proc/{caller}/cwd")
        with open(f"/proc/{caller}/environ", "rb") as file:
            pairs = [pair.split(b"=", 1) for pair in file.read().split(b"\0") if b"=" in pair]
        for item in private:
            item.close()
        os.closerange(3, 1024)
        kernel.set_dumpable(is_dumpable=True)
        os.environ.clear()
        os.environ.update({os.fsdecode(name): os.fsdecode(value) for name, value in pairs})
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        for name in ("stdin", "stdout", "stderr"):
            setattr(sys, f"__{name}__", getattr(sys, name))
        sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(":")), *path]
        sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
        random.seed()
        gc.enable()
        code = _run(arguments)
    except BaseException:  # noqa: BLE001 - a forked child must end here
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code & 0xFF)


def _borrow(caller: int, number: int) -> int:
    try:
        return kernel.borrow_descriptor(caller, number)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return os.open(os.devnull, os.O_RDWR)


def _run(arguments: list[str]) -> int:
    try:
        _execute(arguments)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        sys.stderr.write(f"{stop.code}\n")
        return 1
    except BaseException as error:  # noqa: BLE001 - as the interpreter itself does
        trace = error.__traceback__
        for _ in range(2):
            trace = trace.tb_next if trace else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _execute(arguments: list[str]) -> None:
    main: Any = types.ModuleType("__main__")
    source: str | bytes
    sys.modules["__main__"] = main
    kind = arguments[0] if arguments else "-"
    if kind == "-m":
        sys.argv = ["-m", *arguments[2:]]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]
        return
    if kind == "-c":
        source, name, sys.argv = arguments[1], "<string>", ["-c", *arguments[2:]]
        sys.path.insert(0, "")
    elif kind == "-":
        source, name, sys.argv = sys.stdin.read(), "<stdin>", arguments or [""]
        sys.path.insert(0, "")
    else:
        name = kind if kind.startswith("/") else f"{os.getcwd()}/{kind}"
        source, sys.argv = _source(kind), arguments
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
        main.__file__ = name
    exec(compile(source, name, "exec"), main.__dict__)


def _source(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        why = f"[Errno {error.errno}] {error.strerror}"
        sys.stderr.write(f"python3: can't open file {os.path.abspath(path)!r}: {why}\n")
        raise SystemExit(2) from None
