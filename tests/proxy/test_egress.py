"""The way out: to allowed names at public addresses, and nowhere else."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from katcore.proxy.egress import Egress, is_public
from katcore.proxy.server import Proxy
from katcore.proxy.session import SessionSpec
from katcore.schema.call import Sampling
from katcore.schema.rollout import Visit
from tests.proxy.fakes import FakeEngine

PUBLIC = "93.184.216.34"
ALLOWED = ("allowed.test", "*.sub.test", "ported.test:8443")


class Net:
    """A network: what names resolve to, and one server that is at every address."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self.connected: list[tuple[str, int]] = []
        self.received = b""

    async def resolve(self, host: str) -> list[str]:
        return self.addresses.get(host, [PUBLIC])

    async def connect(
        self, address: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.connected.append((address, port))
        here, there = socket.socketpair()
        self.server = asyncio.create_task(self._serve(*await asyncio.open_connection(sock=there)))
        return await asyncio.open_connection(sock=here)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.received = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nthere")
        writer.close()


Ask = Callable[[bytes], "asyncio.Future[bytes]"]


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def egress(net: Net) -> Egress:
    return Egress(ALLOWED, resolve=net.resolve, connect=net.connect)


@pytest.fixture
async def door(tmp_path: Path, egress: Egress) -> AsyncIterator[tuple[int, str]]:
    """The port of a door, and the key of its session."""
    async with Proxy(tmp_path / "calls.jsonl") as proxy:
        session, endpoint = proxy.open(SessionSpec("s", FakeEngine("hello"), Sampling()))
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        await proxy.listen(session, listening, egress)
        yield port, endpoint.api_key
        await proxy.close(session)
        with pytest.raises(OSError, match=r"[Rr]efused|Connect call failed"):
            await asyncio.open_connection("127.0.0.1", port)


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def visits_of(egress: Egress, num: int) -> list[Visit]:
    """What is on record once `num` connections have ended."""
    async with asyncio.timeout(20):
        while len(egress.visits) < num:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return egress.visits


async def test_the_model_is_still_behind_the_door(door: tuple[int, str], egress: Egress) -> None:
    port, key = door
    body = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}
    async with aiohttp.ClientSession(headers={"x-api-key": key}) as client:
        for path, status in (("chat/completions", 200), ("nothing", 404)):
            async with client.post(f"http://127.0.0.1:{port}/v1/{path}", json=body) as response:
                assert response.status == status
    assert egress.visits == []


async def test_a_tunnel_to_an_allowed_name(door: tuple[int, str], egress: Egress, net: Net) -> None:
    request = b"CONNECT Allowed.test.:443 HTTP/1.1\r\nHost: x\r\n\r\n"
    hello = b"anything at all\r\n\r\n"
    answer = await ask(door[0], request + hello)
    assert answer.startswith(b"HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK")
    assert answer.endswith(b"there")
    assert net.connected == [(PUBLIC, 443)]
    assert net.received == hello
    assert await visits_of(egress, 1) == [Visit("allowed.test", 443, PUBLIC, "", len(hello), 43)]


async def test_plain_http_is_asked_for_by_path_and_under_its_own_name(
    door: tuple[int, str], net: Net
) -> None:
    answer = await ask(
        door[0],
        b"GET http://a.sub.test/x?y=1#z HTTP/1.1\r\nHost: other.test\r\nProxy-Authorization: k\r\n"
        b"Connection: keep-alive\r\nAccept: */*\r\n\r\n",
    )
    assert answer.endswith(b"there")
    assert net.received == (
        b"GET /x?y=1 HTTP/1.1\r\nHost: a.sub.test\r\nConnection: close\r\nAccept: */*\r\n\r\n"
    )


@pytest.mark.parametrize(
    "request_",
    [
       "CONNECT other.test:443", "CONNECT allowed.test:22", "CONNECT ported.test:443", "CONNECT *",
       "CONNECT sub.test:443",
        "CONNECT xsub.test:443", "CONNECT allowed.test.evil.test:443", "CONNECT 127.0.0.1:443",
        "CONNECT 169.254.169.254:80", "CONNECT [::1]:443", "CONNECT localhost:443", "CONNECT allowed.test",
        "CONNECT 2130706433:80", "CONNECT :443", "CONNECT allowed.test:x", "CONNECT evil@allowed.test:443",
        "GET http://169.254.169.254/latest", "GET http://allowed.test@other.test/", "GET http://other.test/",
        "GET https://allowed.test/", "GET ftp://allowed.test/", "GET http:///x", "GET file:///etc/passwd",
        "GET http://allowed.test:22/", "GET allowed.test", "GET http://allowed.test/ x", "GET *",
    ],
)  # fmt: skip
async def test_all_else_is_refused(
    door: tuple[int, str], egress: Egress, net: Net, request_: str
) -> None:
    answer = await ask(door[0], f"{request_} HTTP/1.1\r\nHost: allowed.test\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n"), answer
    assert net.connected == []
    assert all(visit.refused and not visit.address for visit in egress.visits)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1", "255.255.255.255", "240.0.0.1",
        "198.18.0.1", "::1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2001:db8::1",
    ],
)  # fmt: skip
async def test_an_allowed_name_at_an_address_that_is_not_public_is_refused(
    door: tuple[int, str], egress: Egress, net: Net, address: str
) -> None:
    assert not is_public(address)
    for found in ([address], [PUBLIC, address]):
        net.addresses["allowed.test"] = found
        answer = await ask(door[0], b"CONNECT allowed.test:443 HTTP/1.1\r\n\r\n")
        assert f"allowed.test is at {address}: not a public one".encode() in answer
    assert net.connected == []
    assert [visit.host for visit in await visits_of(egress, 2)] == ["allowed.test"] * 2


async def test_a_name_keeps_the_address_that_was_checked(
    door: tuple[int, str], egress: Egress, net: Net
) -> None:
    assert is_public(PUBLIC)
    for address in (PUBLIC, "127.0.0.1", "10.0.0.1"):
        net.addresses["allowed.test"] = [address]
        await ask(door[0], b"CONNECT allowed.test:443 HTTP/1.1\r\n\r\nx\r\n\r\n")
    assert net.connected == [(PUBLIC, 443)] * 3
    assert {visit.address for visit in await visits_of(egress, 3)} == {PUBLIC}


async def test_a_head_without_end_is_cut_off(door: tuple[int, str], net: Net) -> None:
    with contextlib.suppress(ConnectionResetError):
        answer = await ask(door[0], b"CONNECT allowed.test:443 HTTP/1.1\r\nX: " + b"x" * (1 << 17))
        assert b"200 Connection" not in answer
    assert net.connected == []
