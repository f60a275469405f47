"""Pid 1 of a container, and its grader: connects to the backend. Standard library only."""

import functools
import socket
import sys

from kat_sandboxes.docker.difference import Watched, archive
from kat_sandboxes.zygote import alone


def main() -> None:
    """The whole life of a container. Never returns."""
    channel = socket.socket(socket.AF_UNIX)
    channel.connect(sys.argv[1])
    alone.serve(channel, _watch)


def _watch() -> alone.Changes:
    return functools.partial(archive, watched=Watched.now())
