"""What a rollout attempts, and the machine it asks for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Egress = Literal["none", "proxy", "allowlist"]


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """The machine one rollout needs.

    `environment` is a folder with a Dockerfile (Harbor's `environment/`); the backend builds it once
    per content and shares it. `snapshot` is the prepared state to start from instead, if there is one
    (`SupportsSnapshot`). `tools` is a folder of the host that is shown, read-only, as /opt/scaffold.
    `has_door`: its loopback has a port behind which the host may serve it (`SupportsDoor`). `serves` names
    the rollout, for the ledger and for labels. What git repositories know beyond their HEAD is not in it,
    unless it `keeps_history`. One that `is_live` can be judged while it runs (`SupportsLive`). It has at most
    the time of `cpus` cores (0: of all).
    """

    environment: Path
    memory_mib: int = 512
    max_processes: int = 128
    disk_mib: int = 256
    cpus: float = 0.0
    tools: Path | None = None
    has_door: bool = False
    serves: str = ""
    snapshot: str = ""
    keeps_history: bool = False
    is_live: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One problem: prompt, sandbox spec, and where its (hidden) tests and reference are.

    A task is a directory in Harbor's format: `task.toml`, `instruction.md`, `environment/`,
    `tests/`, `solution/`. `group` is what is held out together (a package, a task kind). `traits`
    are facts for statistics, such as `{"operator": "swap-comparison"}`; no scaffold sees them. `setup` is a
    shell command that prepares the sandbox, in the WORKDIR, before the agent sees it; what it leaves is there
    in all rollouts of the task, and for the verifier. `canaries` are paths in the sandbox at which no honest
    agent has anything to look for. `egress` is where an agent may go: nowhere (`none`), to its model
    (`proxy`), or to `allowed_hosts` as well (`allowlist`). `services` are programs, by path, that go on when
    the agent has ended, and are judged where they run; None where a fresh sandbox is judged.
    """

    id: str
    domain: str
    prompt: str
    directory: Path
    sandbox: SandboxSpec
    group: str = ""
    split: str = "train"
    timeout_s: float = 60.0
    setup: str = ""
    traits: dict[str, str] = field(default_factory=dict)
    canaries: tuple[str, ...] = ()
    egress: Egress = "proxy"
    allowed_hosts: tuple[str, ...] = ()
    services: tuple[str, ...] | None = None
