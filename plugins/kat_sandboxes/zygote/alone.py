"""Pid 1 of a sandbox that an engine isolates: it hides and serves. Standard library only.

The engine has taken capabilities and network away already; the container's init is this process, so that
nothing inside can signal or trace it, and what is orphaned inside is reaped.
"""

import contextlib
import os
import socket
import tarfile
from collections.abc import Callable
from typing import Any

from kat_sandboxes.zygote import frame, machine

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Changes = Callable[[bytes], bytes]
"""Gives the archive of what has changed, of which the backend may say what it knows."""


def serve(channel: socket.socket, watch: Callable[[], Changes]) -> None:
    """The whole life of a container: the first message says what it is. Never returns.

    `watch` is called when nothing foreign has run yet.
    """
    message = frame.receive(channel)
    if message:
        try:
            _serve(channel, message[0], watch)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other end has to hear of it
            with contextlib.suppress(OSError):
                channel.sendall(frame.failed(error))
    os._exit(0)


def _serve(channel: socket.socket, spec: dict[str, Any], watch: Callable[[], Changes]) -> None:
    # Names of users are the image's: looking them up would load its libraries into this process.
    tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]
    if spec.get("is_grader"):
        machine.serve_as_grader(channel, spec)
        return
    doors = machine.doors(spec)
    machine.limit(spec["disk_mib"])
    machine.lock()
    own = {"PATH": _PATH, "HOME": os.environ.get("HOME", "/")}
    served = machine.Machine(channel, spec | {"env": own | spec["env"]}, watch())
    socket.send_fds(channel, [frame.pack({"ok": True})], [door.fileno() for door in doors])
    for door in doors:
        door.close()
    served.serve()
