"""Pid 1 of a pod's sandbox: connects to the relay beside it, and serves. Standard library only.

It differs from `kat_sandboxes.docker.agent` in two things: it waits for the relay, which is started at the
same time, and it finds changed files itself.
"""

import contextlib
import os
import socket
import sys
import tarfile
import time
from typing import Any

from kat_sandboxes.kubernetes.tree import Tree
from kat_sandboxes.zygote import frame, machine

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_WAIT_S, _STEP_S = 60.0, 0.02


def main() -> None:
    """The whole life of a sandbox. Never returns."""
    channel = _connect(sys.argv[1])
    message = frame.receive(channel)
    if message:
        try:
            _serve(channel, message[0])
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other end has to hear of it
            with contextlib.suppress(OSError):
                channel.sendall(frame.failed(error))
    os._exit(0)


def _connect(path: str) -> socket.socket:
    until_s = time.monotonic() + _WAIT_S
    while True:
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.connect(path)
        except OSError:
            channel.close()
            if time.monotonic() > until_s:
                raise
            time.sleep(_STEP_S)
        else:
            return channel


def _serve(channel: socket.socket, spec: dict[str, Any]) -> None:
    # Names of users are the image's: looking them up would load its libraries into this process.
    tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]
    doors = machine.doors(spec)
    machine.limit(spec["disk_mib"])
    machine.lock()
    own = {"PATH": _PATH, "HOME": os.environ.get("HOME", "/")}
    tree = Tree()
    served = machine.Machine(channel, spec | {"env": own | spec["env"]}, lambda _: tree.changes())
    socket.send_fds(channel, [frame.pack({"ok": True})], [door.fileno() for door in doors])
    for door in doors:
        door.close()
    served.serve()
