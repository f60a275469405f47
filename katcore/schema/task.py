"""What a rollout attempts, and the machine it asks for."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """The machine one rollout needs.

    `environment` is a folder with a Dockerfile (Harbor's `environment/`); the backend builds it once
    per content and shares it.
    """

    environment: Path
    memory_mib: int = 512
    max_processes: int = 128
    disk_mib: int = 256


@dataclass(frozen=True, slots=True)
class Task:
    """One problem: prompt, sandbox spec, and where its (hidden) tests and reference are.

    A task is a directory in Harbor's format: `task.toml`, `instruction.md`, `environment/`,
    `tests/`, `solution/`. `group` is what is held out together (a package, a task kind). `traits`
    are facts for statistics, such as `{"operator": "swap-comparison"}`; no scaffold sees them.
    """

    id: str
    domain: str
    prompt: str
    directory: Path
    sandbox: SandboxSpec
    group: str = ""
    split: str = "train"
    timeout_s: float = 60.0
    traits: dict[str, str] = field(default_factory=dict)
