"""A way out to some hosts: CONNECT and plain HTTP, by name and port, to public addresses alone.

Names are resolved here, once for a rollout, and what is connected to is the address that was checked: no
later answer of a name server leads to another. What runs inside a TLS tunnel is not looked at.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from katcore.schema.rollout import Visit

Resolve = Callable[[str], Awaitable[Sequence[str]]]
Connect = Callable[[str, int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

_PORTS = (80, 443)
_METADATA = ("168.63.129.16", "192.0.0.192")
"""Addresses of clouds' own services that look like public ones."""
_PATIENCE_S = 20.0
_MAX_OPEN = 64
_PIECE = 1 << 16
_OWN_HEADERS = (b"host:", b"connection:", b"proxy-", b"keep-alive:")


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    """Why a request is not passed on."""


class Egress:
    """The way out of one rollout. `allowed` are names: `pypi.org`, `*.example.org`, `example.org:8443`."""

    def __init__(
        self,
        allowed: Sequence[str],
        *,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
    ) -> None:
        self.visits: list[Visit] = []
        self._allowed = tuple(_parsed(entry) for entry in allowed)
        self._resolve = resolve or _addresses
        self._connect = connect or asyncio.open_connection
        self._pinned: dict[str, str] = {}
        self._num_open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        host, port, address, refused, counts = "", 0, "", "", [0, 0]
        self._num_open += 1
        try:
            async with asyncio.timeout(_PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                host, port, opening = _target(head)
                address = await self._address(host, port)
                there = await self._connect(address, port)
            await _splice((reader, writer), there, opening, counts)
        except Refusal as refusal:
            refused = str(refusal)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            refused = f"it failed: {type(error).__name__}: {error}"
        finally:
            self._num_open -= 1
            if host:
                self.visits.append(Visit(host, port, address, refused, *counts))
            with contextlib.suppress(OSError):
                if refused:
                    writer.write(_forbidden(refused))
                    await writer.drain()
            writer.close()

    async def _address(self, host: str, port: int) -> str:
        """The public address that a name has for this rollout."""
        if self._num_open > _MAX_OPEN:
            raise Refusal(f"more than {_MAX_OPEN} connections are open")
        if not any(_matches(host, port, *entry) for entry in self._allowed):
            raise Refusal(f"{host}:{port} is not among the hosts that the task allows")
        if host not in self._pinned:
            found = await self._resolve(host)
            private = [address for address in found if not is_public(address)]
            if private or not found:
                raise Refusal(
                    f"{host} is at {', '.join(private) or 'no address'}: not a public one"
                )
            self._pinned[host] = found[0]
        return self._pinned[host]


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's, of version 4."""
    parsed = ipaddress.ip_address(address)
    is_global = parsed.version == 4 and parsed.is_global and not parsed.is_multicast
    return is_global and address not in _METADATA


def _parsed(entry: str) -> tuple[str, tuple[int, ...]]:
    host, _, port = entry.partition(":")
    return host, (int(port),) if port else _PORTS


def _matches(host: str, port: int, allowed: str, ports: tuple[int, ...]) -> bool:
    is_beneath = allowed.startswith("*.") and host.endswith(allowed[1:])
    return port in ports and (host == allowed or is_beneath)


def _target(head: bytes) -> tuple[str, int, bytes]:
    """Host, port, and what is to be sent there first; nothing for a tunnel."""
    line, *headers = head[:-4].split(b"\r\n")
    try:
        method, target, version = line.decode("ascii").split(" ")
        is_tunnel = method == "CONNECT"
        parts = urlsplit(f"//{target}" if is_tunnel else target)
        host, port = (parts.hostname or "").rstrip("."), parts.port or (0 if is_tunnel else 80)
    except ValueError as error:
        raise Refusal("it is no request of a proxy") from error
    if not host or parts.username or (parts.scheme != "http" and not is_tunnel):
        raise Refusal("it is no CONNECT and no request of an http:// address")
    if is_tunnel:
        return host, port, b""
    path = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
    kept = [header for header in headers if not header.lower().startswith(_OWN_HEADERS)]
    place = host if port == 80 else f"{host}:{port}"
    first = f"{method} {path} {version}\r\nHost: {place}\r\nConnection: close".encode()
    return host, port, b"\r\n".join([first, *kept]) + b"\r\n\r\n"


async def _addresses(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(
        host, None, family=socket.AF_INET, type=socket.SOCK_STREAM
    )
    return [str(item[4][0]) for item in found]


async def _splice(
    here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    opening: bytes,
    counts: list[int],
) -> None:
    """Pass bytes both ways until both ends have ended; `counts` are those sent, and received."""
    if opening:
        there[1].write(opening)
        counts[0] = len(opening)
    else:
        here[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
    try:
        await asyncio.gather(
            _pump(here[0], there[1], counts, 0), _pump(there[0], here[1], counts, 1)
        )
    finally:
        there[1].close()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: list[int], way: int
) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE):
            counts[way] += len(piece)
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def _forbidden(why: str) -> bytes:
    text = f"katcore: {why}\n".encode()
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + text
