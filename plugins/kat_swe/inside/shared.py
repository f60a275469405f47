"""What is said alike inside and outside the sandbox."""

import hashlib

HANGS = "fail: it does not end"
"""The result of a test that ran past its limit."""


def digest(data: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(data).hexdigest()[:16]
