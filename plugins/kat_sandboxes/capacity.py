"""What this machine has for sandboxes."""

import os
import resource
from pathlib import Path

from katcore.schema.capacity import Capacity

_PER_CORE = 16
"""How many may work at once on a core: most of the time, an agent waits for its model."""
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
_KEPT_DESCRIPTORS = 128


def of_this_machine() -> Capacity:
    """Memory and processes of the machine or its container, descriptors of this process."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [pages, *filter(None, map(_limit, _LIMITS))]
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Capacity(
        sandboxes=_PER_CORE * len(os.sched_getaffinity(0)),
        memory_mib=min(limits) >> 20,
        processes=pid_max,
        descriptors=max(16, descriptors - _KEPT_DESCRIPTORS),
    )


def _limit(name: str) -> int:
    """Of the container, where there is one; 0 where none is set."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0
