"""What the ledger keeps: who holds sandboxes, and which."""

from dataclasses import dataclass
from typing import Literal

LeaseState = Literal["creating", "running", "left"]
"""`left`: its holder could not destroy it, and lives on."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with one open sandbox backend.

    `mark` is in all that its backend makes, and in nothing else. `process` names the process (see
    `katcore.sandbox.process`), `host` the machine, for people. `run` is the scheduled run it belongs to, and
    `work` what of it. `seen_s` is when it last wrote, by the ledger's clock; the ledger sets it.
    """

    id: str
    backend: str
    options: str
    mark: str
    host: str
    process: str
    run: str = ""
    work: str = ""
    seen_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Lease:
    """One sandbox. `serves` is its rollout; `handle` what its backend finds it by, once it is made."""

    id: str
    holder: str
    serves: str = ""
    opened_s: float = 0.0
    state: LeaseState = "creating"
    handle: str = ""
