"""The physical bound of a log: a bare write and fdatasync of records of the same size, on the same disk."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from katcore.trajectory.calls import write_all


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A folder below `root` that is removed with all that is in it."""
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix="running-") as folder:
        yield Path(folder)


def bare_fsync_ms(folder: Path, size: int, times: int) -> list[float]:
    """How long each of some writes of `size` bytes took to be on disk."""
    path = folder / "bare"
    data = os.urandom(max(1, size))
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    taken = []
    try:
        for _ in range(times):
            started_s = time.perf_counter()
            write_all(file, data)
            os.fdatasync(file)
            taken.append((time.perf_counter() - started_s) * 1000)
    finally:
        os.close(file)
        path.unlink()
    return taken


def percentile(values: list[float], share: float) -> float | None:
    """The smallest of `values` that at least `share` of them do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    at = -(-len(ordered) * round(share * 1000) // 1000) - 1
    return ordered[max(0, at)]


def machine() -> str:
    """What the figures were measured on, in words."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({_processor()}), Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
