"""Real bugs: what a function was in an older release, where a later release repaired one line of it."""

from pathlib import Path

from kat_swe.function import Function, functions
from kat_swe.inside.edit import tokens
from kat_swe.mutant import Mutant, changed, spliced
from kat_swe.operator import Edit, edit_at

OPERATOR = "release"


def repaired(older: Path, text: str, function: Function) -> Mutant | None:
    """The older function in the newer module, if it differs in one line that one edit repairs."""
    old = _counterpart(older, function)
    if old is None or len(old.shown) != len(function.shown):
        return None
    differ = [
        at
        for at, pair in enumerate(zip(old.shown, function.shown, strict=True))
        if pair[0] != pair[1]
    ]
    if len(differ) != 1:
        return None
    at = function.lines[differ[0]]
    indent = " " * _indent(function.source[at])
    was = indent + old.shown[differ[0]].strip()
    lines = list(function.source)
    lines[at] = was
    wrong = changed(function, tuple(lines))
    repair = _repair(wrong, at, function.source) if wrong else None
    if wrong is None or repair is None:
        return None
    return Mutant(wrong, function, spliced(text, function, wrong.source), repair, OPERATOR)


def _counterpart(older: Path, function: Function) -> Function | None:
    for prefix in ("", "src/"):
        for file in {function.file, function.file.removeprefix("src/")}:
            path = older / (prefix + file)
            if path.is_file():
                for found in functions(function.file, path.read_text(errors="replace")):
                    if found.name == function.name:
                        return found
    return None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _repair(wrong: Function, at: int, right: tuple[str, ...]) -> Edit | None:
    """The shortest edit of line `at` that gives the right function."""
    old, new = wrong.source[at], right[at].rstrip()
    before, after = tokens(old), tokens(new)
    head = 0
    while head < min(len(before), len(after)) and before[head][2] == after[head][2]:
        head += 1
    tail = 0
    limit = min(len(before), len(after)) - head
    while tail < limit and before[-1 - tail][2] == after[-1 - tail][2]:
        tail += 1
    for first in range(head, -1, -1):
        part, other = before[first : len(before) - tail], after[first : len(after) - tail]
        if part:
            replacement = new[other[0][0] : other[-1][1]] if other else ""
            text = "".join(text for _, _, text in part)
            edit = edit_at(wrong, at, part[0][0], text, replacement, OPERATOR)
            if edit and edit.is_plain and edit.apply(wrong) == right:
                return edit
    return None
