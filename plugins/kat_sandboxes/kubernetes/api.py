"""The cluster's API: the few requests that sandboxes need, tried again while it is busy or away.

Through the official client's asynchronous part, which knows kubeconfigs, credentials that expire, service
accounts and TLS. Its session also carries what that part has no method for, `exec`.
"""

import asyncio
import hashlib
import json
import os
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.config.config_exception import ConfigException

from kat_sandboxes.kubernetes.config import KubernetesConfig
from katcore.errors import (
    NoCapacityError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
    StartTimeoutError,
)

Json = dict[str, Any]
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_S = 30.0
_WATCH_S = 240
_FIRST_S, _MOST_S = 0.2, 10.0
_PROTOCOL = "v4.channel.k8s.io"
_STDIN, _STDOUT, _ERROR = 0, 1, 3
_MOST_BYTES = 1 << 16


class GoneError(SandboxGoneError):
    """The API knows no such object, or no such version any more."""


class Api:
    """One cluster and namespace. Made without asking it anything."""

    def __init__(self, config: KubernetesConfig) -> None:
        self._config = config
        self._client: Any = None
        self._lock = asyncio.Lock()
        self._answered = False
        self.namespace = config.namespace or _namespace(config.context)

    @property
    def place(self) -> str:
        """A short name of this cluster and namespace, the same from all machines."""
        where = f"{_server(self._config.context)}\0{self.namespace}"
        return hashlib.sha256(where.encode()).hexdigest()[:6]

    async def close(self) -> None:
        """Let go of the connections."""
        if self._client:
            await self._client.close()

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
    ) -> Json:
        """One request, tried again while the API is busy or away, for `patience_s` seconds.

        Raises:
            GoneError: 404 or 410.
            NoCapacityError: a quota is used up.
            SandboxUnavailableError: it refuses for good, or never answered.
            StartTimeoutError: it answered before, and does not any more.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._config.patience_s
        tries = 0
        while True:
            try:
                async with self._request(method, path, body=body, query=query) as answer:
                    text = await answer.read()
                    self._answered = True
                    if answer.status == 409 and tries and method == "POST":
                        return {}  # an earlier try has made it, and its answer was lost
                    if answer.status < 400:
                        return dict(json.loads(text))
                    delay_s, said = _asked_delay(answer), _said(text)
                    error = _refusal(answer.status, said)
                    if error:
                        raise error
            except (OSError, aiohttp.ClientError, TimeoutError) as failure:
                delay_s, said = 0.0, str(failure) or type(failure).__name__
            tries += 1
            span_s = min(_MOST_S, _FIRST_S * 2.0 ** min(tries, 10))
            delay_s = max(delay_s, random.uniform(span_s / 2, span_s))
            if loop.time() + delay_s > until_s:
                raise self._away(said)
            await asyncio.sleep(delay_s)

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Json]:
        """The events of one watch, until it ends or breaks: then OSError, GoneError or what `call` raises."""
        more = {"watch": "1", "allowWatchBookmarks": "true", "timeoutSeconds": str(_WATCH_S)}
        timeout_s = _WATCH_S + _TIMEOUT_S
        async with self._request(
            "GET", path, query={**query, **more}, timeout_s=timeout_s
        ) as answer:
            if answer.status >= 400:
                said = _said(await answer.read())
                raise _refusal(answer.status, said) or ConnectionError(said)
            while line := await answer.content.readline():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    said = str(event["object"].get("message", ""))
                    raise _refusal(event["object"].get("code", 0), said) or ConnectionError(said)
                yield event

    @asynccontextmanager
    async def execute(self, pod: str, container: str, argv: list[str]) -> AsyncIterator["Exec"]:
        """Run a command in a container; its standard input and output. Raises GoneError, OSError."""
        query = [("container", container), ("stdin", "1"), ("stdout", "1"), ("stderr", "0")]
        query += [("command", word) for word in argv]
        session, url, headers = await self._prepared(f"{self.pods}/{pod}/exec")
        try:
            async with session.ws_connect(
                url, params=query, headers=headers, protocols=[_PROTOCOL], max_msg_size=0
            ) as socket:
                yield Exec(socket)
        except aiohttp.WSServerHandshakeError as error:
            if error.status == 404:
                raise GoneError(f"there is no pod {pod}") from error
            raise ConnectionError(f"exec into {pod}: {error.status} {error.message}") from error
        except aiohttp.ClientError as error:
            raise ConnectionError(f"exec into {pod}: {error}") from error

    @property
    def pods(self) -> str:
        """The path of this namespace's pods."""
        return f"/api/v1/namespaces/{self.namespace}/pods"

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        query: Mapping[str, str] | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        session, url, headers = await self._prepared(path)
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=_TIMEOUT_S)
        async with session.request(
            method, url, json=body, params=query, headers=headers, timeout=timeout
        ) as answer:
            yield answer

    async def _prepared(self, path: str) -> tuple[aiohttp.ClientSession, str, dict[str, str]]:
        async with self._lock:
            if self._client is None:
                self._client = await self._open()
        headers: dict[str, str] = {"Accept": "application/json"}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"])
        session: aiohttp.ClientSession = self._client.rest_client.pool_manager
        return session, f"{self._client.configuration.host}{path}", headers

    async def _open(self) -> Any:
        made = client.Configuration()
        made.connection_pool_maxsize = 0  # each open sandbox holds one connection
        try:
            if _is_inside():
                config.load_incluster_config(client_configuration=made)
            else:
                await config.load_kube_config(
                    _file(), context=self._config.context or None, client_configuration=made
                )
        except (ConfigException, OSError) as error:
            raise SandboxUnavailableError(
                f"no cluster is known: {error}. Set KUBECONFIG, or run in a pod with a service account"
            ) from error
        return client.ApiClient(configuration=made)

    def _away(self, said: str) -> SandboxError:
        text = f"the API of the cluster does not serve: {said}"
        if self._answered:
            return StartTimeoutError(f"{text} (for {self._config.patience_s:g} s)")
        return SandboxUnavailableError(f"{text}. Look at the kubeconfig's server, and KUBECONFIG")


class Exec:
    """The standard input and output of a command, by the channels of one WebSocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._data = bytearray()

    async def readexactly(self, n: int) -> bytes:
        """So many bytes of its output. Raises ConnectionError at the end."""
        while len(self._data) < n:
            message = await self._socket.receive()
            if message.type is not aiohttp.WSMsgType.BINARY:
                raise ConnectionError(f"the stream has ended: {message.type.name}")
            if message.data[:1] == bytes([_STDOUT]):
                self._data += memoryview(message.data)[1:]
            elif message.data[:1] == bytes([_ERROR]):
                raise ConnectionError(
                    f"the command has ended: {message.data[1:].decode(errors='replace')}"
                )
        found = bytes(self._data[:n])
        del self._data[:n]
        return found

    async def write(self, data: bytes) -> None:
        """Bytes of its input."""
        for start in range(0, len(data), _MOST_BYTES):
            piece = bytes([_STDIN]) + data[start : start + _MOST_BYTES]
            await self._socket.send_bytes(piece)


def _refusal(status: int, said: str) -> SandboxError | None:
    """What an answer means; None if the same may be served later."""
    if status in (404, 410):
        return GoneError(said)
    if status == 403 and "exceeded quota" in said:
        return NoCapacityError(f"a quota of the namespace is used up: {said}")
    if status in (401, 403):
        return SandboxUnavailableError(
            f"the cluster refuses: {said}. docs/how-to/sandboxes.md lists the rights"
        )
    if status in (400, 405, 409, 413, 415, 422):
        return SandboxError(f"the cluster refuses: {said}")
    return None


def _asked_delay(answer: aiohttp.ClientResponse) -> float:
    asked = answer.headers.get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0


def _said(text: bytes) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300].decode(errors="replace")


def _is_inside() -> bool:
    """In a pod, and without a kubeconfig of one's own."""
    has_own = os.environ.get("KUBECONFIG") or (Path.home() / ".kube" / "config").exists()
    return not has_own and "KUBERNETES_SERVICE_HOST" in os.environ


def _file() -> str | None:
    """Read now: the client has read the environment when it was imported."""
    return os.environ.get("KUBECONFIG")


def _context(name: str) -> Json:
    """A context of the kubeconfig, or of none."""
    try:
        contexts, active = config.list_kube_config_contexts(_file())
    except (ConfigException, OSError):
        return {}
    return next((item for item in contexts if item["name"] == name), {}) if name else active


def _namespace(context: str) -> str:
    if _is_inside():
        return _ACCOUNT.read_text().strip() if _ACCOUNT.exists() else "default"
    return str(_context(context).get("context", {}).get("namespace") or "default")


def _server(context: str) -> str:
    """What tells clusters apart, by a name that is the same on all machines that use this kubeconfig."""
    if _is_inside():
        return f"{os.environ['KUBERNETES_SERVICE_HOST']}"
    return str(_context(context).get("context", {}).get("cluster", ""))
