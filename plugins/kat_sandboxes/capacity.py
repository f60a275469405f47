"""What this machine has for sandboxes."""

import os
import resource
from pathlib import Path

from kat_sandboxes.zygote import hierarchy
from katcore.schema.capacity import Capacity
from katcore.schema.task import SandboxSpec

_PER_CORE = 16
"""How many may work at once on a core: most of the time, an agent waits for its model."""
_KEPT_DESCRIPTORS = 128


def of_this_machine() -> Capacity:
    """Memory and processes of the machine or its container, descriptors of this process."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = {pages, _limit(f"{hierarchy.BASE}/memory/memory.limit_in_bytes")}
    processes = {int(Path("/proc/sys/kernel/pid_max").read_text())}
    for folder in hierarchy.above(hierarchy.own()) if hierarchy.is_unified() else ():
        memory.add(_limit(f"{folder}/memory.max"))
        processes.add(_limit(f"{folder}/pids.max"))
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Capacity(
        sandboxes=_PER_CORE * len(os.sched_getaffinity(0)),
        memory_mib=min(filter(None, memory)) >> 20,
        processes=min(filter(None, processes)),
        descriptors=max(16, descriptors - _KEPT_DESCRIPTORS),
    )


def cores(spec: SandboxSpec, most: float) -> float:
    """How many cores a sandbox may use: what its task says, but no more than `most`. 0 is all."""
    return min(filter(None, (spec.cpus, most)), default=0.0)


def _limit(path: str) -> int:
    """Of this process's group or one above it; 0 where none is set."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0
