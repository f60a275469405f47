"""What a sandbox needs, and what a backend has, under the settings of a run."""

from dataclasses import replace

from katcore.config import ScheduleSettings
from katcore.protocols import SandboxBackend, SupportsCapacity
from katcore.schema.capacity import Capacity, Demand
from katcore.schema.task import SandboxSpec

_DESCRIPTORS = 4.0
"""A channel, a door, and connections through it."""


def demand_of(spec: SandboxSpec) -> Demand:
    """The most that a sandbox of this spec may use."""
    return Demand(float(spec.memory_mib), float(spec.max_processes), _DESCRIPTORS)


def capacity_of(backend: SandboxBackend, settings: ScheduleSettings) -> Capacity:
    """What may be promised to sandboxes at once: what the backend has, unless the settings say otherwise."""
    has = backend.capacity() if isinstance(backend, SupportsCapacity) else Capacity()
    has = replace(
        has,
        memory_mib=has.memory_mib * settings.overcommit,
        processes=has.processes * settings.overcommit,
    )
    given = {
        "sandboxes": settings.max_open,
        "memory_mib": settings.memory_mib,
        "starts_per_s": settings.starts_per_s,
    }
    return replace(has, **{name: value for name, value in given.items() if value is not None})
