"""What every sandbox does, done beforehand where all are forked from: each then writes to less memory.

Python notes down what it looks up, and makes code faster for what it meets. A fork that finds this as it
needs it shares it.
"""

import contextlib
import marshal
import os
import socket
import threading
import time
from typing import Any

from kat_sandboxes.zygote import cgroups, files, frame, kernel, machine, sandbox, warm

TIMES = 12
"""Python looks at code after it has run eight times."""
_LOOK_S = 0.001
_EXEC = {"do": "exec", "argv": ["true"], "env": {"A": ""}, "cwd": "/", "timeout_s": 5.0}
_SPEC = marshal.dumps({"env": {"PATH": "/usr/bin:/bin"}, "workdir": "/"}, 0)
_DISK_MIB = 1 << 40
"""More than any sandbox has: what is a limit here is one there."""


def rehearse() -> None:
    """For a process with one thread. By the end it is what it was, with lower limits."""
    lock = threading.Thread(target=_lock)
    lock.start()
    lock.join()
    while len(os.listdir("/proc/self/task")) > 1:  # a fork would keep the locks that it still has
        time.sleep(_LOOK_S)
    kernel.set_dumpable(is_dumpable=True)
    for _ in range(TIMES):
        _serve()


def _lock() -> None:
    """In a thread: privileges are a thread's own."""
    for _ in range(TIMES):
        kernel.drop_privileges()
        machine.lock()


def _serve() -> None:
    mine, theirs = socket.socketpair()
    pid = kernel.fork_into(0)
    if pid == 0:
        mine.close()
        _ask(theirs)
        os._exit(0)
    theirs.close()
    spec = marshal.loads(_SPEC)
    cgroups.join([os.devnull, os.devnull])
    upper, *lowers = sandbox.made_apart(mine, _make)
    machine.limit(_DISK_MIB)
    root = files.Root(upper, lowers)
    with socket.create_server(("127.0.0.1", 0)) as listener, mine:
        python = warm.Python(listener, (mine, root), ())
        served = machine.Machine(mine, spec, _no_changes, python)
        socket.send_fds(mine, [frame.pack({"ok": True})], [])
        served.serve()
        served.close()
    root.close()
    with contextlib.suppress(ChildProcessError):  # it may have been waited for, as commands are
        os.waitpid(pid, 0)


def _ask(channel: socket.socket) -> None:
    frame.receive(channel)
    for _ in range(2):
        channel.sendall(frame.pack(_EXEC))
        frame.receive(channel)


def _make() -> list[int]:
    return [os.open("/", os.O_PATH) for _ in range(2)]


def _no_changes(_: Any) -> bytes:
    return b""
