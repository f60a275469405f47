"""Pulling from a registry over HTTP on this machine, which asks for tokens, breaks off and lies."""

import asyncio
import base64
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
import trustme
from aiohttp import web

from katcore.errors import ImageError
from katcore.sandbox.image import ImageStore
from katcore.sandbox.imported import pull_image
from katcore.sandbox.registry import Reference
from tests.sandbox.images import blobs_of, index_of, layer

LAYERS = (layer(("a", b"1" * 300_000), ("gone", b"x")), layer((".wh.gone", b""), ("b", b"2")))
TOKEN = "t0ken"


@dataclass
class Registry:
    """Serves one image as `team/image:1`. `cuts`: so often the connection breaks amid a layer."""

    blobs: dict[str, bytes]
    manifest: str
    login: str = ""
    has_token: bool = True
    scheme: str = "http"
    cuts: int = 0
    has_ranges: bool = True
    elsewhere: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    host: str = ""

    async def serve(self, request: web.Request) -> web.StreamResponse:
        kind, name = request.match_info["kind"], request.match_info["name"]
        if self.has_token and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            realm = self.elsewhere or f"{self.scheme}://{self.host}/token"
            challenge = f'Bearer realm="{realm}",service="here",scope="repository:team/image:pull"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        self.asked[f"{kind}/{name}"] += 1
        if name == "1":
            return web.Response(body=index_of(self.manifest, len(self.blobs[self.manifest])))
        if name not in self.blobs:
            return web.Response(status=404, text="no such thing")
        return await self._send(request, self.blobs[name], is_cut=kind == "blobs")

    async def _send(self, request: web.Request, data: bytes, *, is_cut: bool) -> web.StreamResponse:
        start = request.http_range.start or 0 if self.has_ranges else 0
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(data) - start
        await response.prepare(request)
        rest = data[start:]
        if self.cuts and is_cut and len(rest) > 20:
            self.cuts -= 1
            rest = rest[: len(rest) // 2]
        await response.write(rest)
        self.sent += len(rest)
        if start + len(rest) < len(data):
            assert request.transport
            request.transport.close()
        return response

    async def token(self, request: web.Request) -> web.Response:
        assert request.query["scope"] == "repository:team/image:pull"
        expected = f"Basic {base64.b64encode(self.login.encode()).decode()}"
        if self.login and request.headers.get("Authorization") != expected:
            return web.Response(status=403)
        return web.json_response({"token": TOKEN})


@asynccontextmanager
async def served(host: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Registry]:
    blobs, manifest = blobs_of(LAYERS, WorkingDir="/srv")
    made = Registry(blobs, manifest, scheme="https" if tls else "http")
    app = web.Application()
    app.router.add_get("/token", made.token)
    app.router.add_get("/v2/team/image/{kind}/{name}", made.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, host, 0, ssl_context=tls).start()
    made.host = f"{host}:{runner.addresses[0][1]}"
    try:
        yield made
    finally:
        await runner.cleanup()


@pytest_asyncio.fixture
async def registry() -> AsyncIterator[Registry]:
    async with served("127.0.0.1") as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


async def pull(
    registry: Registry, root: Path, *, login: str = "", version: str = ":1"
) -> ImageStore:
    store = ImageStore(root)
    text = f"{registry.host}/team/image{version}"
    await pull_image(store, root, text, name="pulled", login=login, report=lambda _: None)
    return store


def check(store: ImageStore, root: Path) -> None:
    image = store.named("pulled")
    assert image
    assert image.workdir == "/srv"
    (folder,) = store.folders(image)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert (folder / "a").read_bytes() == b"1" * 300_000
    assert list((root / "pulls").iterdir()) == []


async def test_an_image_is_pulled_with_a_token(registry: Registry, root: Path) -> None:
    check(await pull(registry, root), root)
    assert set(registry.asked.values()) == {1}


async def test_elsewhere_it_is_https_with_an_authority_that_is_trusted(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, tls = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.2").configure_cert(tls)
    async with served("127.0.0.2", tls) as registry:
        with pytest.raises(ImageError, match=r"certificate verify failed.*SSL_CERT_FILE"):
            await pull(registry, root)
        authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        check(await pull(registry, root), root)


async def test_a_registry_that_asks_for_none_gets_none(registry: Registry, root: Path) -> None:
    registry.has_token = False
    check(await pull(registry, root), root)


async def test_a_digest_is_as_good_as_a_tag(registry: Registry, root: Path) -> None:
    check(await pull(registry, root, version=f"@{registry.manifest}"), root)


async def test_a_login_is_for_the_token_alone(registry: Registry, root: Path) -> None:
    registry.login = "me:secret"
    with pytest.raises(ImageError, match="no token: HTTP 403"):
        await pull(registry, root)
    check(await pull(registry, root, login="me:secret"), root)


async def test_a_connection_that_breaks_is_taken_up_where_it_was(
    registry: Registry, root: Path
) -> None:
    registry.cuts = 2
    check(await pull(registry, root), root)
    assert registry.cuts == 0
    assert registry.sent == sum(map(len, registry.blobs.values())), "each byte came once"


async def test_without_ranges_it_begins_anew(registry: Registry, root: Path) -> None:
    registry.cuts, registry.has_ranges = 1, False
    check(await pull(registry, root), root)


async def test_after_giving_up_the_next_pull_goes_on(registry: Registry, root: Path) -> None:
    registry.cuts = 4
    with pytest.raises(ImageError, match="goes on from here"):
        await pull(registry, root)
    sent = registry.sent
    check(await pull(registry, root), root)
    assert registry.sent - sent < sum(map(len, registry.blobs.values()))


async def test_a_blob_that_is_not_its_digest_is_thrown_away(registry: Registry, root: Path) -> None:
    true = dict(registry.blobs)
    for digest, data in true.items():
        if data.startswith(b"\x1f\x8b"):
            registry.blobs[digest] = data[:-1] + b"!"
    with pytest.raises(ImageError, match="not what its digest says"):
        await pull(registry, root)
    assert ImageStore(root).named("pulled") is None
    registry.blobs = true
    check(await pull(registry, root), root)


async def test_a_manifest_that_is_not_its_digest_is_refused(registry: Registry, root: Path) -> None:
    registry.blobs[registry.manifest] += b" "
    with pytest.raises(ImageError, match="not what its digest says"):
        await pull(registry, root)


async def test_what_is_not_there_says_so(registry: Registry, root: Path) -> None:
    with pytest.raises(ImageError, match="HTTP 404: no such thing"):
        await pull(registry, root, version=":2")


async def test_a_registry_that_is_not_there_says_so(root: Path) -> None:
    with pytest.raises(ImageError, match=r"127\.0\.0\.1:9"):
        await pull(Registry({}, "", host="127.0.0.1:9"), root)


async def test_a_token_over_plain_http_elsewhere_is_refused(registry: Registry, root: Path) -> None:
    registry.elsewhere = "http://192.0.2.1/token"
    async with asyncio.timeout(10):
        with pytest.raises(ImageError, match="not HTTPS"):
            await pull(registry, root)


@pytest.mark.parametrize(
    ("text", "host", "repository", "version"),
    [
        ("debian", "docker.io", "library/debian", "latest"),
        ("debian:12", "docker.io", "library/debian", "12"),
        ("team/image", "docker.io", "team/image", "latest"),
        ("ghcr.io/a/b/c:v1.2-x", "ghcr.io", "a/b/c", "v1.2-x"),
        ("localhost:5000/a", "localhost:5000", "a", "latest"),
        ("localhost/a:1", "localhost", "a", "1"),
        ("a@sha256:" + "0" * 64, "docker.io", "library/a", "sha256:" + "0" * 64),
    ],
)
def test_references_are_read_as_docker_does(
    text: str, host: str, repository: str, version: str
) -> None:
    assert Reference.parse(text) == Reference(host, repository, version)


@pytest.mark.parametrize(
    "text", ["", "A", "a b", "a@sha256:0", "a@md5:0", "../x", "a:/etc", "x.y/"]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(ImageError):
        Reference.parse(text)


def test_only_this_machine_is_asked_without_https() -> None:
    assert Reference.parse("localhost:5000/a").url.scheme == "http"
    assert Reference.parse("127.0.0.1/a").url.scheme == "http"
    assert str(Reference.parse("debian").url) == "https://registry-1.docker.io/v2/library/debian/"
    assert Reference.parse("localhost.example.com/a").url.scheme == "https"
