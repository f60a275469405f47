"""Pid 1 of a container, and its grader: connects to the backend, hides, and serves. Standard library only.

The engine has taken all capabilities and the network away already; the container's init is this process, so
that nothing inside can signal or trace it, and what is orphaned inside is reaped.
"""

import contextlib
import os
import socket
import sys
import tarfile
from typing import Any

from kat_sandboxes.docker.difference import Watched, archive
from kat_sandboxes.zygote import frame, machine

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> None:
    """The whole life of a container. Never returns."""
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(sys.argv[1])
    message = frame.receive(channel)
    if message:
        try:
            _serve(channel, message[0])
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other end has to hear of it
            with contextlib.suppress(OSError):
                channel.sendall(frame.failed(error))
    os._exit(0)


def _serve(channel: socket.socket, spec: dict[str, Any]) -> None:
    # Names of users are the image's: looking them up would load its libraries into this process.
    tarfile.pwd = tarfile.grp = None  # type: ignore[attr-defined]
    if spec["is_grader"]:
        machine.serve_as_grader(channel, spec)
        return
    doors = machine.doors(spec)
    machine.limit(spec["disk_mib"])
    machine.lock()
    own = {"PATH": _PATH, "HOME": os.environ.get("HOME", "/")}
    watched = Watched.now()
    served = machine.Machine(
        channel, spec | {"env": own | spec["env"]}, lambda listed: archive(listed, watched)
    )
    socket.send_fds(channel, [frame.pack({"ok": True})], [door.fileno() for door in doors])
    for door in doors:
        door.close()
    served.serve()
