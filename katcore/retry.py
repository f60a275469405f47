"""What to do about a failure that no policy is to blame for: the one place that says so.

The delay before a try is drawn from the upper half of a span that doubles each time, so that what failed
together does not come back together.
"""

import random
from dataclasses import dataclass
from enum import StrEnum

from katcore.errors import (
    ConfigError,
    EvictedError,
    ImageMissingError,
    NoCapacityError,
    OutOfDiskError,
    OutOfMemoryError,
    PluginError,
    SandboxUnavailableError,
    StartTimeoutError,
    TaskError,
)


class Next(StrEnum):
    """What comes after a failure."""

    AGAIN = "again"
    """The same once more."""
    ELSEWHERE = "elsewhere"
    """The same on another node, where there is one; the node that failed gets a rest."""
    NEVER = "never"
    """It would only fail again."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What follows one kind of failure: at most `times` more tries, `first_s` to `most_s` seconds apart."""

    next: Next
    times: int = 2
    first_s: float = 0.2
    most_s: float = 10.0

    def delay_s(self, tries: int, draw: random.Random) -> float:
        """How long to wait after so many tries, the first of which is 1."""
        span = min(self.most_s, self.first_s * 2.0 ** min(tries - 1, 60))
        return span * draw.uniform(0.5, 1.0)


_NEVER = Rule(Next.NEVER, times=0)
_OTHER = Rule(Next.AGAIN)
_RULES: tuple[tuple[type[Exception], Rule], ...] = (
    (TaskError, _NEVER),
    (ConfigError, _NEVER),
    (PluginError, _NEVER),
    (SandboxUnavailableError, _NEVER),
    (ImageMissingError, _NEVER),
    # The memory of a sandbox is its task's; once more shows whether it was an accident.
    (OutOfMemoryError, Rule(Next.AGAIN, times=1)),
    (OutOfDiskError, Rule(Next.ELSEWHERE, times=2, first_s=2.0, most_s=30.0)),
    (EvictedError, Rule(Next.ELSEWHERE, times=4, first_s=0.5)),
    (StartTimeoutError, Rule(Next.ELSEWHERE, times=3, first_s=2.0, most_s=30.0)),
    # Room comes back as others end: patience is cheaper than a lost rollout.
    (NoCapacityError, Rule(Next.ELSEWHERE, times=8, first_s=1.0, most_s=60.0)),
)


def rule_for(error: Exception) -> Rule:
    """The first rule of the table that is for the error's class; what has none is tried again."""
    return next((rule for kind, rule in _RULES if isinstance(error, kind)), _OTHER)
