"""Token trees of coding agents at any size: what their calls share was recorded, what they said was not.

`recorded.json` has for each session its stretches, in depth-first order: the number of the stretch above (-1
at a beginning), bytes, and whether the model said it. scripts/record_shapes.py writes it, by running agents.
"""

import json
from importlib import resources
from typing import NamedTuple

FILE = "recorded.json"


class Stretch(NamedTuple):
    """Tokens that follow each other, all trained or all not."""

    above: int
    length: int
    is_trained: bool


def sessions() -> dict[str, list[Stretch]]:
    """By name and version of the agent."""
    content = json.loads(resources.files("katcore.bench").joinpath(FILE).read_text())
    return {name: [Stretch(*stretch) for stretch in found] for name, found in content.items()}


def stretches(parents: tuple[int, ...], trained: tuple[bool, ...]) -> list[Stretch]:
    """Those of a token tree."""
    forks = {above for at, above in enumerate(parents) if above != at - 1}
    number: list[int] = []
    found: list[Stretch] = []
    for at, above in enumerate(parents):
        is_next = found and above == at - 1 and above not in forks
        if is_next and trained[at] == found[-1].is_trained:
            found[-1] = found[-1]._replace(length=found[-1].length + 1)
        else:
            found.append(Stretch(number[above] if above >= 0 else -1, 1, trained[at]))
        number.append(len(found) - 1)
    return found


def scaled(session: list[Stretch], num_tokens: int) -> tuple[list[int], list[bool]]:
    """Parents of about so many tokens, and which are trained; a stretch keeps at least one."""
    factor = num_tokens / sum(stretch.length for stretch in session)
    parents: list[int] = []
    trained: list[bool] = []
    last: list[int] = []
    for above, length, is_trained in session:
        kept = max(1, round(length * factor))
        start = len(parents)
        parents += [last[above] if above >= 0 else -1, *range(start, start + kept - 1)]
        trained += [is_trained] * kept
        last.append(len(parents) - 1)
    return parents, trained
