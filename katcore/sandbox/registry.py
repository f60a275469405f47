"""Pulls an image from a registry into an OCI layout, and goes on with what an earlier try fetched.

HTTPS only, but for a registry on this machine. A token is asked for where the registry says so, anonymously
or with a login. Protocol: https://github.com/opencontainers/distribution-spec.
"""

import base64
import hashlib
import json
import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
from yarl import URL

from katcore.errors import ImageError
from katcore.sandbox.oci import MOST_BYTES, blob_name, for_this_machine

_HUB, _HUB_HOST = "docker.io", "registry-1.docker.io"
_ACCEPT = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "docker.distribution.manifest.list.v2",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.v2",
    )
)
_REPOSITORY = re.compile(r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*")
_HOST = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9.-]*(:[0-9]+)?")
_TAG = re.compile(r"[\w.-]*")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
_TRIES = 4
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Reference:
    """Where an image is: `host` with its port, the repository, and a tag or digest."""

    host: str
    repository: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`[HOST[:PORT]/]PATH[:TAG|@DIGEST]`, with Docker Hub and `latest` where nothing is said.

        Raises:
            ImageError: it is none.
        """
        name, _, digest = text.partition("@")
        head, slash, rest = name.partition("/")
        is_host = slash and (head == "localhost" or "." in head or ":" in head)
        host, path = (head, rest) if is_host else (_HUB, name)
        path, _, tag = path.partition(":")
        if host == _HUB and "/" not in path:
            path = f"library/{path}"
        if digest:
            blob_name(digest)
        parts = ((_HOST, host), (_REPOSITORY, path), (_TAG, tag))
        if not all(pattern.fullmatch(part) for pattern, part in parts):
            raise ImageError(f"{text!r} names no image; write [HOST/]NAME[:TAG]")
        return cls(host, path, digest or tag or "latest")

    @property
    def url(self) -> URL:
        """The repository's, at its registry."""
        host = _HUB_HOST if self.host == _HUB else self.host
        scheme = "http" if URL(f"//{host}").host in _LOOPBACK else "https"
        return URL(f"{scheme}://{host}/v2/{self.repository}/")


async def pull(
    reference: Reference, folder: Path, *, login: str = "", report: Callable[[str], None]
) -> None:
    """Fill `folder` with the image. `login` is `user:password`.

    Raises:
        ImageError: there is no such image, it is not for this machine, or the registry fails.
    """
    try:
        # aiohttp's own was made when it was imported, and its errors say less.
        trusted = aiohttp.TCPConnector(ssl=ssl.create_default_context())
        async with aiohttp.ClientSession(timeout=_TIMEOUT, connector=trusted) as session:
            await _Puller(session, reference, folder, login).run(report)
    except aiohttp.ClientConnectorCertificateError as error:
        raise ImageError(
            f"{reference.url}: {error.certificate_error}; if an authority of your own signed it, let"
            " SSL_CERT_FILE name a file of authorities that has it"
        ) from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ImageError(
            f"{reference.url}: {error!r}; the same command goes on from here"
        ) from error


class _Puller:
    def __init__(
        self, session: aiohttp.ClientSession, reference: Reference, folder: Path, login: str
    ) -> None:
        self._session = session
        self._reference = reference
        self._folder = folder
        self._login = login
        self._token = ""

    async def run(self, report: Callable[[str], None]) -> None:
        data = await self._manifest(self._reference.version)
        document = _parse(data)
        if "manifests" in document:
            data = await self._manifest(for_this_machine(document["manifests"])["digest"])
            document = _parse(data)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        path = self._folder / blob_name(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        try:
            blobs = [document["config"], *document["layers"]]
            sizes = [(str(item["digest"]), int(item["size"])) for item in blobs]
        except (KeyError, TypeError, ValueError) as error:
            raise ImageError(
                f"{self._reference.url}: no manifest of an image: {error!r}"
            ) from error
        for number, (wanted, size) in enumerate(sizes):
            report(f"{number + 1} of {len(sizes)}: {size / 1e6:.1f} MB")
            await self._blob(wanted, size)
        index = {"schemaVersion": 2, "manifests": [{"digest": digest, "size": len(data)}]}
        (self._folder / "index.json").write_text(json.dumps(index))

    async def _manifest(self, version: str) -> bytes:
        url = self._reference.url / "manifests" / version
        async with await self._get(url, {"Accept": _ACCEPT}) as response:
            data = await response.content.read(MOST_BYTES + 1)
            while len(data) <= MOST_BYTES and (more := await response.content.read(MOST_BYTES)):
                data += more
        if len(data) > MOST_BYTES:
            raise ImageError(f"{url}: larger than {MOST_BYTES >> 20} MiB")
        if version.startswith("sha256:") and hashlib.sha256(data).hexdigest() != version[7:]:
            raise ImageError(f"{url}: not what its digest says")
        return data

    async def _blob(self, digest: str, size: int) -> None:
        """Fetch what is missing of it; a connection that breaks is taken up again."""
        path = self._folder / blob_name(digest)
        if path.exists():
            return
        part = path.with_suffix(".part")
        for tries_left in reversed(range(_TRIES)):
            try:
                await self._fetch(self._reference.url / "blobs" / digest, part, size)
            except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, TimeoutError):
                if not tries_left:
                    raise
            else:
                break
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if f"sha256:{found}" != digest:
            part.unlink()
            raise ImageError(f"{digest}: what came is not what its digest says; it was thrown away")
        part.rename(path)

    async def _fetch(self, url: URL, part: Path, size: int) -> None:
        has = _size(part)
        if has == size:
            return
        headers = {"Range": f"bytes={has}-"} if 0 < has < size else {}
        async with await self._get(url, headers) as response:
            with part.open("ab" if response.status == 206 else "wb") as file:
                async for block in response.content.iter_chunked(_BLOCK):
                    file.write(block)
                    if file.tell() > size:
                        raise ImageError(f"{url}: more than the {size} bytes that were announced")
                os.fsync(file.fileno())
                if file.tell() < size:
                    raise aiohttp.ClientPayloadError(f"{file.tell()} of {size} bytes")

    async def _get(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        """An answer that says yes. A token is fetched if it is asked for."""
        response = await self._ask(url, headers)
        if response.status == 401:
            challenge = response.headers.get("WWW-Authenticate", "")
            response.release()
            await self._authenticate(challenge)
            response = await self._ask(url, headers)
        if response.status >= 400:
            said = (await response.text(errors="replace"))[:200]
            response.release()
            raise ImageError(f"{url}: HTTP {response.status}: {said}")
        return response

    async def _ask(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        bearer = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        response = await self._session.get(url, headers=headers | bearer)
        if response.url.scheme != "https" and response.url.host not in _LOOPBACK:
            response.close()
            raise ImageError(f"{url}: it leads to {response.url.origin()}, which is not HTTPS")
        return response

    async def _authenticate(self, challenge: str) -> None:
        kind, _, rest = challenge.partition(" ")
        asked = dict(_CHALLENGE.findall(rest))
        if kind.lower() != "bearer" or "realm" not in asked:
            raise ImageError(
                f"{self._reference.host} asks for {kind or 'a login'}; bearer is known here"
            )
        realm = URL(asked.pop("realm"))
        if realm.scheme != "https" and realm.host not in _LOOPBACK:
            raise ImageError(
                f"{self._reference.host} gives its tokens at {realm}, which is not HTTPS"
            )
        query = {name: asked[name] for name in ("service", "scope") if name in asked}
        login = base64.b64encode(self._login.encode()).decode()
        headers = {"Authorization": f"Basic {login}"} if self._login else {}
        async with self._session.get(realm.update_query(query), headers=headers) as response:
            if response.status != 200:
                raise ImageError(f"{realm}: no token: HTTP {response.status}")
            content = await response.json(content_type=None)
        self._token = content.get("token") or content.get("access_token") or ""


def _size(part: Path) -> int:
    """How much of a blob is there; -1 if nothing ever came."""
    return part.stat().st_size if part.exists() else -1


def _parse(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ImageError(f"what came is no manifest: {error}") from error
    if not isinstance(content, dict):
        raise ImageError("what came is no manifest")
    return content
