"""What sandboxes use up: of a node what it has, of a sandbox what it needs."""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one node has for sandboxes; infinite where no limit is known.

    `sandboxes` is how many may be open at once, `starts_per_s` how many may be opened in a second.
    """

    sandboxes: float = inf
    memory_mib: float = inf
    processes: float = inf
    descriptors: float = inf
    starts_per_s: float = inf


@dataclass(frozen=True, slots=True)
class Demand:
    """What one sandbox may use up."""

    memory_mib: float = 0.0
    processes: float = 1.0
    descriptors: float = 0.0
