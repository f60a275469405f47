"""Bodies of requests as they came, each stored as what is new against the call it continues.

An agent sends its whole history with every call. Of a list (`messages`, `input`, `tools`) that begins as the
parent's did, only the rest is kept; a field that is the parent's is named, not repeated.
"""

import base64
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from katcore.errors import StageError
from katcore.schema.call import ModelCall
from katcore.trajectory.prefix import num_common

_Digests = dict[str, bytes | list[bytes]]


class Requests:
    """The bodies of one session, by call id; only their digests are held."""

    def __init__(self) -> None:
        self._seen: dict[str, _Digests] = {}

    def delta(self, call_id: str, parent: str, body: Mapping[str, Any]) -> str:
        """`body` as text, less what the body of call `parent` has, too."""
        before = self._seen.get(parent, {})
        digests: _Digests = {}
        fields: list[tuple[str, str, Any]] = []
        for name, value in body.items():
            known = before.get(name)
            if isinstance(value, list):
                items = [_digest(item) for item in value]
                digests[name] = items
                num = num_common(items, known) if isinstance(known, list) else 0
                fields.append((name, "list", [num, value[num:]]))
            else:
                digests[name] = _digest(value)
                is_same = known == digests[name]
                fields.append((name, "same", None) if is_same else (name, "value", value))
        self._seen[call_id] = digests
        return base64.b64encode(zlib.compress(orjson.dumps(fields), 1)).decode()


def restore(calls: Iterable[ModelCall]) -> dict[str, dict[str, Any]]:
    """The bodies of a session's calls (in call order), by call id.

    Raises:
        StageError: a body is damaged, or its parent's is missing.
    """
    bodies: dict[str, dict[str, Any]] = {}
    for call in calls:
        if not call.raw:
            continue
        try:
            fields = orjson.loads(zlib.decompress(base64.b64decode(call.raw, validate=True)))
            before = bodies.get(call.parent, {})
            bodies[call.call_id] = {
                name: _value(kind, value, before, name) for name, kind, value in fields
            }
        except (ValueError, KeyError, zlib.error) as error:
            raise StageError(f"call {call.call_id}: its body cannot be read: {error!r}") from error
    return bodies


def _value(kind: str, value: Any, before: dict[str, Any], name: str) -> Any:
    if kind == "same":
        return before[name]
    if kind == "list":
        num, rest = value
        return [*(before[name][:num] if num else ()), *rest]
    return value


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(orjson.dumps(value), digest_size=12).digest()
