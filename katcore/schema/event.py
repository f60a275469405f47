"""What observers are told. New facts become new fields."""

from dataclasses import dataclass, field

from katcore.schema.rollout import Rollout


@dataclass(frozen=True, slots=True)
class RolloutFinished:
    """One rollout ended, scored or not."""

    rollout: Rollout


@dataclass(frozen=True, slots=True)
class StageFinished:
    """A stage wrote its manifest (or was skipped because it already had)."""

    stage: str
    uri: str
    is_skipped: bool
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelRegistered:
    """The registry has a new version."""

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...] = ()
