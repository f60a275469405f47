"""What one rollout leaves: trajectory, verdict, outcome."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from katcore.schema.call import Message, Origin


class Outcome(StrEnum):
    """How a rollout ended, and whose fault it was."""

    SCORED = "scored"
    """The verifier gave a verdict. Only these carry a reward."""
    SANDBOX_FAILED = "sandbox-failed"
    ENGINE_FAILED = "engine-failed"
    SCAFFOLD_FAILED = "scaffold-failed"
    VERIFIER_FAILED = "verifier-failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says. `reward` is in [0, 1], or None if nothing can be said."""

    reward: float | None
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Turn:
    """One model call inside a trajectory tree.

    `parent` is the index of the turn it continues (-1: a root). `prompt_ids` are the ids that were new
    to this call (environment tokens, never trained); `ids` are the sampled ones with `logprobs`.
    """

    parent: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    messages: tuple[Message, ...]
    text: str
    policy_version: str
    origin: Origin = "sampled"
    role: Literal["main", "auxiliary", "discarded"] = "main"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """All turns of one rollout, as a tree in call order."""

    session_id: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt at one task: what happened, and whether it may be learnt from."""

    id: str
    task_id: str
    domain: str
    group: str
    attempt: int
    outcome: Outcome
    trajectory: Trajectory
    verdict: Verdict
    exit_reason: str = ""
    error: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    schema_version: int = 1

    @property
    def reward(self) -> float | None:
        """The reward, or None unless the rollout was scored."""
        return self.verdict.reward if self.outcome is Outcome.SCORED else None


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command did. A non-zero `exit_code` is a result, not an error."""

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class ModelEndpoint:
    """Where a scaffold reaches its model. The key names the rollout; it is not the engine's."""

    base_url: str
    api_key: str
    model: str
