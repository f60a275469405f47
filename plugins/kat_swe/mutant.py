"""A wrong version of a module: one edit in one function, and the edit that takes it back."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from kat_swe.function import Function, read
from kat_swe.operator import Edit, edits

_MAX_PER_FUNCTION = 5


@dataclass(frozen=True, slots=True)
class Mutant:
    """`function` is the wrong one, as it stands in `text`; `right` is what it should be."""

    function: Function
    right: Function
    text: str
    repair: Edit
    operator: str

    @property
    def id(self) -> str:
        """The same for the same change of the same function."""
        content = (
            f"{self.function.file}\0{self.function.name}\0{self.right.text}\0{self.function.text}"
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def spliced(text: str, function: Function, source: tuple[str, ...]) -> str:
    """A module's text with other lines for one of its functions."""
    lines = text.split("\n")
    lines[function.start : function.end] = source
    return "\n".join(lines)


def mutants(text: str, function: Function) -> list[Mutant]:
    """The mutants of a function that one edit repairs; at most a dozen, operators in turn."""
    made = [mutant for edit in edits(function) if (mutant := mutate(text, function, edit))]
    draw = random.Random(f"{function.file}/{function.name}")
    draw.shuffle(made)
    by_operator: dict[str, list[Mutant]] = {}
    for mutant in made:
        by_operator.setdefault(mutant.operator, []).append(mutant)
    turns = [group[row] for row in range(len(made)) for group in _at_least(by_operator, row)]
    return turns[:_MAX_PER_FUNCTION]


def _at_least(groups: dict[str, list[Mutant]], row: int) -> Iterator[list[Mutant]]:
    return (group for _, group in sorted(groups.items()) if len(group) > row)


def mutate(text: str, function: Function, edit: Edit) -> Mutant | None:
    """The mutant of an edit; None unless one edit of the mutant gives back the exact source."""
    source = edit.apply(function)
    if source is None or source == function.source:
        return None
    wrong = changed(function, source)
    if wrong is None:
        return None
    for repair in edits(wrong):
        if repair.apply(wrong) == function.source:
            return Mutant(wrong, function, spliced(text, function, source), repair, edit.operator)
    return None


def changed(function: Function, source: tuple[str, ...]) -> Function | None:
    """The function with other source lines."""
    return read(function.file, function.name, function.start, function.key, source)
