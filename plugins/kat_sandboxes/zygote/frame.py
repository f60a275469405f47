"""Messages between the backend and a machine: a JSON head and a body of bytes."""

import json
import socket
import struct
from typing import Any

_LENGTHS = struct.Struct("!II")
HEADER_BYTES = _LENGTHS.size
DOOR = 8823
"""The port of a sandbox's door, on its own loopback."""


def pack(head: dict[str, Any], body: bytes = b"") -> bytes:
    """One message as bytes."""
    text = json.dumps(head).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


def failed(error: BaseException) -> bytes:
    """The message that a machine could not be set up."""
    number = getattr(error, "errno", None) or 0
    return pack({"error": "setup", "reason": repr(error), "errno": number})


def lengths(header: bytes) -> tuple[int, int]:
    """How long head and body are."""
    head, body = _LENGTHS.unpack(header)
    return head, body


def receive(channel: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """The next message, or None at the end of the stream."""
    header = _exactly(channel, HEADER_BYTES)
    if header is None:
        return None
    num_head, num_body = lengths(header)
    head, body = _exactly(channel, num_head), _exactly(channel, num_body)
    if head is None or body is None:
        return None
    return json.loads(head), body


def _exactly(channel: socket.socket, num_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < num_bytes:
        piece = channel.recv(min(num_bytes - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)
