"""Aims: what a figure should be, and whether it is."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Aim:
    """One aim. `wanted` is in words."""

    what: str
    found: float
    wanted: str
    is_met: bool

    @classmethod
    def at_most(cls, what: str, found: float, limit: float) -> Self:
        """Lower is better."""
        return cls(what, found, f"<= {limit:g}", found <= limit)

    @classmethod
    def at_least(cls, what: str, found: float, limit: float) -> Self:
        """Higher is better."""
        return cls(what, found, f">= {limit:g}", found >= limit)
