"""Pid 1 of a pod's sandbox: connects to the relay beside it. Standard library only.

It differs from `kat_sandboxes.docker.agent` in two things: it waits for the relay, which is started at the
same time, and it finds changed files itself.
"""

import socket
import sys
import time

from kat_sandboxes.kubernetes.tree import Tree
from kat_sandboxes.zygote import alone

_WAIT_S, _STEP_S = 60.0, 0.02


def main() -> None:
    """The whole life of a sandbox. Never returns."""
    alone.serve(_connect(sys.argv[1]), _watch)


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


def _watch() -> alone.Changes:
    tree = Tree()
    return lambda _: tree.changes()
