"""What one rollout leaves: trajectory, verdict, outcome."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from katcore.schema.call import Message, Origin, Tool, ToolCall


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
class Flag:
    """A sign of cheating.

    `kind` is `canary`, `survivor`, `tests-changed`, `programs`, or a verifier's own word.
    """

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says. `reward` is in [0, 1], or None if nothing can be said.

    With any of `flags` the reward of a rollout is 0; what it would have been is the metric `unflagged`.
    `is_live`: given in the agent's own sandbox, not in a fresh one.
    """

    reward: float | None
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    is_live: bool = False


TurnRole = Literal["main", "subagent", "post-compaction", "auxiliary", "discarded"]
"""`main`: the agent's own conversation; `post-compaction`: the same after its history was put into a summary;
`subagent`: one that it started, and waited for; `auxiliary`: titles, summaries, probes; `discarded`: an
answer that was asked for again, and not used."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One model call inside a trajectory tree.

    `parent` is the index of the turn whose conversation it shares (-1: none). Of that conversation, answer
    included, its prompt begins with the first `num_shared_messages` messages and the first `num_shared` ids;
    `messages` and `prompt_ids` follow (the environment's, never trained). `ids` are the answer with its
    `logprobs`. `tools` None are the parent's.
    """

    parent: int
    num_shared_messages: int
    num_shared: int
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    messages: tuple[Message, ...]
    text: str
    policy_version: str
    origin: Origin = "sampled"
    role: TurnRole = "main"
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[Tool, ...] | None = None
    is_exact: bool = True
    started_s: float = 0.0
    seconds: float = 0.0

    @property
    def num_ids(self) -> int:
        """Ids of the conversation that it leaves."""
        return self.num_shared + len(self.prompt_ids) + len(self.ids)

    @property
    def message(self) -> Message:
        """The answer as a message."""
        return Message("assistant", self.text, self.reasoning, self.tool_calls)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """All turns of one rollout, as a tree in call order."""

    session_id: str
    turns: tuple[Turn, ...]

    def prompt(self, number: int) -> tuple[Message, ...]:
        """All messages that turn `number` was asked with, as far as the turns before it are there."""
        turn = self.turns[number]
        parts, left = [turn.messages], turn.num_shared_messages
        while left and turn.parent >= 0:
            turn = self.turns[turn.parent]
            own = (*turn.messages, turn.message)
            parts.append(own[: max(0, left - turn.num_shared_messages)])
            left = min(left, turn.num_shared_messages)
        return tuple(message for part in reversed(parts) for message in part)

    def tools(self, number: int) -> tuple[Tool, ...]:
        """The tools that turn `number` was offered."""
        turn = self.turns[number]
        while turn.tools is None and turn.parent >= 0:
            turn = self.turns[turn.parent]
        return turn.tools or ()


@dataclass(frozen=True, slots=True)
class Visit:
    """One connection through the way out of a task that has one.

    `refused` says why it was; "" if it was let through. `address` is what the name was resolved to on the
    host; `sent` and `received` are bytes.
    """

    host: str
    port: int
    address: str = ""
    refused: str = ""
    sent: int = 0
    received: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt at one task: what happened, and whether it may be learnt from.

    `scaffold` is its name and, where it was installed, its version: `claude-code 2.1.330`.
    """

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
    scaffold: str = ""
    visits: tuple[Visit, ...] = ()
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
    """Where a scaffold reaches its model. The key names the rollout; it is not the engine's.

    `base_url` has no `/v1`. It is for a scaffold beside the proxy, `inside_url` for one in the sandbox (""
    where the sandbox has no door).
    """

    base_url: str
    api_key: str
    model: str
    inside_url: str = ""


@dataclass(frozen=True, slots=True)
class Installation:
    """A scaffold as installed: its version, its folder, and what it needs of a sandbox at least."""

    version: str
    tools: Path | None
    memory_mib: int
    max_processes: int
    disk_mib: int
