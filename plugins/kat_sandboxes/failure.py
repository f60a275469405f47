"""What made a sandbox fail, as one of the errors that say so."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from katcore.errors import (
    EvictedError,
    NoCapacityError,
    OutOfDiskError,
    OutOfMemoryError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ROOM = {
    errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EUSERS,
}  # fmt: skip
"""What the kernel says if memory, processes, namespaces, mounts or descriptors are used up or still busy."""


def gone(cause: str, do: str) -> SandboxGoneError:
    """What became of a machine that does not answer any more. `cause`: "memory", "killed", or not known."""
    if cause == "memory":
        return OutOfMemoryError(f"the sandbox ran out of memory during {do}; raise its limit")
    if cause == "killed":
        return EvictedError(f"the sandbox was killed from outside during {do}")
    return SandboxGoneError(f"the sandbox died during {do}")


def setup_failed(head: dict[str, Any]) -> SandboxError:
    """A machine that could not be set up, from its first message (`zygote.frame.failed`)."""
    if head["errno"] in _NO_ROOM:
        return NoCapacityError(f"this machine has no room for another sandbox: {head['reason']}")
    return SandboxUnavailableError(f"the sandbox could not be set up: {head['reason']}")


@contextlib.contextmanager
def no_room_said() -> Iterator[None]:
    """While the host prepares a sandbox: its disk may be full, or its descriptors used up."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OutOfDiskError(f"no image can be made: {error}") from error
        if error.errno in _NO_ROOM:
            raise NoCapacityError(f"this machine has no room for a sandbox: {error}") from error
        raise
