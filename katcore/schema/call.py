"""One model call, as the proxy saw it."""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
Origin = Literal["sampled", "scripted", "tokenised"]
"""`sampled`: ids and log-probabilities from an engine; `scripted`: an oracle's text, tokenised once."""


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy. Log-probabilities are post-temperature."""

    temperature: float = 1.0
    max_tokens: int = 64
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What the proxy asks of an engine. `session_id` is the rollout's id."""

    session_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine sampled: ids (the end-of-turn token included) and one log-probability each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Literal["stop", "length"]
    policy_version: str
    origin: Origin = "sampled"


@dataclass(frozen=True, slots=True)
class ModelCall:
    """One line of the append-only call log: written and synced before the answer is released.

    `prompt_ids` is stored as a delta: the call continues `parent` (a call id of the same session, or
    "" for none), shares its first `num_shared` ids (prompt + completion of the parent), and adds
    `new_prompt_ids`. `exact` is False if the agent's history could not be matched to recorded ids.
    """

    call_id: str
    session_id: str
    parent: str
    num_shared: int
    new_prompt_ids: tuple[int, ...]
    new_messages: tuple[Message, ...]
    generation: Generation
    requested: Sampling
    used: Sampling
    started_s: float
    finished_s: float
    exact: bool = True
    schema_version: int = 1
    extra: dict[str, str] = field(default_factory=dict)
