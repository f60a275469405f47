"""JSON over HTTP on loopback, past any proxy that the environment names."""

import json
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from katcore.errors import ServiceError

_opener = build_opener(ProxyHandler({}))


class UnreachableError(ServiceError):
    """Nobody answers; a little later somebody may."""


class RefusedError(ServiceError):
    """The server answered with an error; `status` is its number."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def call(
    method: str,
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    token: str = "",
    timeout_s: float = 30.0,
) -> Any:
    """The answer to a request, decoded.

    Raises:
        UnreachableError: no answer.
        RefusedError: an answer of 400 or more.
    """
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, headers, method=method)
    try:
        with _opener.open(request, timeout=timeout_s) as answer:
            content = answer.read()
    except HTTPError as error:
        raise RefusedError(error.code, f"{method} {url}: {error.code} {_detail(error)}") from error
    except (URLError, HTTPException, OSError) as error:
        raise UnreachableError(f"{method} {url}: no answer ({error})") from error
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


def _detail(error: HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, KeyError, TypeError):
        return text[:500]
