"""One model call, as the proxy saw it."""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
Origin = Literal["sampled", "scripted", "api", "tokenised"]
"""Where an answer's ids come from: `sampled` by an engine, with log-probabilities; `scripted`, an oracle's
text, tokenised once; `api`, a service that gives text and no ids; `tokenised`, mixed or imported."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the model asks a scaffold to do. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """What a scaffold offers. `parameters` is the text of a JSON schema."""

    name: str
    description: str
    parameters: str


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message, whichever dialect it came in.

    `images` are URLs (`data:` or other), in order. A `tool` message answers the call `tool_call_id`.
    """

    role: Role
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing off.

    Log-probabilities are those of the distribution that was drawn from, after all of these.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    seed: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What the proxy asks of an engine. `session_id` is the rollout's id."""

    session_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Ids, and the places of those whose log-probabilities are asked for: ascending, from 1 on.

    They are asked for as if each had been drawn by `sampling` after those before it.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine sampled: ids (the end-of-turn token included) and one log-probability each.

    `text`, `reasoning` and `tool_calls` are what the ids say. An engine that gives no ids (`api`) leaves
    both tuples empty, and counts in `usage`: tokens of prompt and answer.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Literal["stop", "length"]
    policy_version: str
    origin: Origin = "sampled"
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    usage: tuple[int, int] = (0, 0)

    @property
    def message(self) -> Message:
        """The answer as a message of the conversation."""
        return Message("assistant", self.text, self.reasoning, self.tool_calls)


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One call of the append-only log: written and synced before the answer is released.

    It is stored as a difference. Of the messages the first `num_shared_messages` are those of `parent` (a
    call id of the same session, "" for none), its answer included; `new_messages` follow. Of the prompt's
    ids the first `num_shared` are those of the parent (prompt and answer); `new_prompt_ids` follow. `tools`
    None are the parent's. `num_retokenised` counts the answers in the prompt that were said by nobody, as
    far as the session knows: their ids were made from their text. `raw` is the request's body, in the form
    of `katcore.trajectory.raw`.
    """

    call_id: str
    session_id: str
    parent: str
    num_shared_messages: int
    new_messages: tuple[Message, ...]
    num_shared: int
    new_prompt_ids: tuple[int, ...]
    generation: Generation
    requested: Sampling
    used: Sampling
    started_s: float
    finished_s: float
    num_retokenised: int = 0
    tools: tuple[Tool, ...] | None = None
    dialect: str = ""
    raw: str = ""
    extra: dict[str, str] = field(default_factory=dict)
    schema_version: int = 1

    @property
    def num_messages(self) -> int:
        """Messages of the conversation that this call leaves, its answer included."""
        return self.num_shared_messages + len(self.new_messages) + 1

    @property
    def num_ids(self) -> int:
        """Ids of the conversation that this call leaves, its answer included."""
        return self.num_shared + len(self.new_prompt_ids) + len(self.generation.ids)

    @property
    def is_exact(self) -> bool:
        """Whether all answers in the prompt stand there by the ids in which they were given."""
        return not self.num_retokenised


@dataclass(frozen=True, slots=True)
class CallFailure:
    """A request that got no answer. It has no place in a trajectory; the log keeps it for people."""

    failure: str
    session_id: str
    dialect: str
    message: str
    at_s: float
