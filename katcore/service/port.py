"""Ports on loopback."""

import socket
from collections.abc import Callable

from katcore.errors import ServiceError

HOST = "127.0.0.1"
_TRIED = 50


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(wanted: int, what: str, say: Callable[[str], None], taken: tuple[int, ...] = ()) -> int:
    """The wanted port, or the next free one; says so if it is another.

    Raises:
        ServiceError: the number is no port, or none of the next ones is free.
    """
    if not 0 < wanted < 65536:
        raise ServiceError(f"{wanted} is no port for {what}; choose one of 1024 to 65535")
    for port in range(wanted, min(wanted + _TRIED, 65536)):
        if port not in taken and is_free(port):
            if port != wanted:
                say(f"port {wanted} is taken; {what} listens on the next free one, {port}")
            return port
    raise ServiceError(
        f"no free port for {what} from {wanted} to {wanted + _TRIED - 1}; choose another with"
        " `kat up --port` (Airflow) or `kat up --mlflow-port`"
    )
