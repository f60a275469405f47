"""Calls of a vLLM server's HTTP API, and whose fault its refusals are."""

import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from katcore.errors import (
    ContextOverflowError,
    EngineBusyError,
    EngineError,
    EngineGoneError,
    KatError,
    RequestError,
)

_TIMEOUT = aiohttp.ClientTimeout(total=3600.0, sock_connect=30.0)
"""An answer comes whole, so nothing is heard of a long one until it is over."""
_OVERFLOW = ("context length is", "maximum context length", "maximum model length")
_RETRY_S = 5.0
_MAX_SAID = 500


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. `key` is "" where it wants none; `start` tells its starts apart."""

    url: str
    key: str = field(default="", repr=False)
    start: int = 0


class VllmClient:
    """Connections to one server. Made where an event loop runs."""

    def __init__(self, address: Address) -> None:
        self.url = address.url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=0)
        )

    async def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What `path` answers to a GET or, with a body, a POST. Cancelling it closes the connection.

        Raises:
            EngineGoneError: nobody answers.
            EngineBusyError: the server says that it is busy.
            RequestError: the server says that the request is wrong; `ContextOverflowError` if it is too long.
            EngineError: it failed in another way.
        """
        text = await self._text("GET" if body is None else "POST", path, body)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            said = text[:_MAX_SAID]
            raise EngineError(f"{self.url}{path} gave no JSON; is it vLLM? {said}") from error

    async def tell(self, path: str, body: dict[str, Any] | None = None) -> None:
        """POST to `path`, whose answer says nothing but that it was done. Raises as `call` does."""
        await self._text("POST", path, body or {})

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _text(self, method: str, path: str, body: dict[str, Any] | None) -> str:
        try:
            async with self._session.request(method, self.url + path, json=body) as answer:
                status, text = answer.status, await answer.text()
                retry = answer.headers.get("Retry-After", "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            said = str(error) or type(error).__name__
            raise EngineGoneError(f"{self.url} does not answer: {said}") from error
        if status >= 400:
            raise self._refusal(path, status, _said(text), retry)
        return text

    def _refusal(self, path: str, status: int, said: str, retry: str) -> KatError:
        if status in {429, 503}:
            wait_s = float(retry) if retry.isdecimal() else _RETRY_S
            return EngineBusyError(f"{self.url} is busy: {said}", wait_s)
        if status in {400, 413, 422}:
            is_long = any(mark in said for mark in _OVERFLOW)
            return ContextOverflowError(said) if is_long else RequestError(said)
        if status in {401, 403}:
            return EngineError(
                f"{self.url} refuses the key; name the environment variable that holds it in `key`"
            )
        return EngineError(f"{self.url}{path} failed with {status}: {said}")


def _said(text: str) -> str:
    """The message of an error, in any of the shapes that vLLM and FastAPI give it."""
    try:
        found = json.loads(text)
        found = found.get("error", found)
        found = found if isinstance(found, str) else found.get("message") or found["detail"]
        return str(found)[:_MAX_SAID]
    except (ValueError, AttributeError, KeyError):
        return text[:_MAX_SAID]
