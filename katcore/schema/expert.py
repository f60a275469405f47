"""An expert domain: names and settings, no behaviour."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Expert:
    """One domain's recipe. Every name is that of an installed offer.

    `synthesis` is passed to the synthesizer's config; a preset may override any of these settings
    by expert name.
    """

    name: str
    title: str
    summary: str
    synthesizer: str
    dataset: str
    scaffold: str
    verifier: str
    formatter: str = "tree"
    synthesis: dict[str, Any] = field(default_factory=dict)
    scaffold_options: dict[str, Any] = field(default_factory=dict)
    verifier_options: dict[str, Any] = field(default_factory=dict)
    formatter_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """An oracle's way to solve a task, turn by turn; replayed by the scripted engine.

    `style` names how it works ("hindsight": straight to the fix; "careful": reads, tests, retries).
    """

    task_id: str
    style: str
    turns: tuple[str, ...]
