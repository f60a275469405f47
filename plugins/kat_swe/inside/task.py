"""The agent's tools, run inside the sandbox: `t` and `fix "OLD NEW" [N]`.

`fix` replaces the Nth OLD of the function (by default the first), or removes it where there is no NEW, and
runs the failing test. In NEW, `@` is OLD itself; `~` is OLD with the two sides of its comma changed over.
Where just that was tried, it takes the next OLD; where the function has no OLD, the word most like it of
those left to try. It starts from the function as it was given, so that a wrong try needs no undoing. What
it says of a try that did not help ends with the words that are left to try.
`task.json` says where the function is, which test fails, and which edits a function like it invites.
"""

import json
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kat_swe.inside.edit import meant, places, replaced
from kat_swe.inside.probe import ROOT, limit, probe

_USAGE = 'usage: fix "OLD NEW" [N]'
_TRIED = Path("/opt/swe/tried.json")
_MAX_WORDS = 12
_LIKENESS = 0.4
"""Of a misspelt word to the one that is meant: twice the characters they share by those of both."""


def main(verb: str, arguments: list[str]) -> str:
    """The answer to a command."""
    task = json.loads(Path("/opt/swe/task.json").read_text())
    limit()
    if verb == "t":
        return probe(task["test"])
    return fix(task, arguments)


def fix(task: dict[str, Any], request: list[str]) -> str:
    """Make one edit and run the failing test."""
    done = tried()
    words = request[0].split(None, 1) if request else []
    which = request[1] if len(request) > 1 else ""
    if not words or (which and not which.isdecimal()) or len(request) > 2:
        return f"{_USAGE}\n{left(task, done)}"
    old, new = words[0], words[1] if len(words) > 1 else ""
    lines = list(task["source"])
    shown_lines = [lines[at] for at in task["lines"]]
    if not any(places(shown_lines, old)):
        old = next(iter(get_close_matches(old, untried(task, done), n=1, cutoff=_LIKENESS)), old)
    found = list(places(shown_lines, old))
    new = meant(old, new)
    first = int(which or 1)
    if not 1 <= first <= len(found):
        return f"error: {len(found) or 'no'} {old[:20]} here\n{left(task, done)}"
    order = [*range(first, len(found) + 1), *range(1, first)]
    number = next((at for at in order if [old, new, at] not in done), 0)
    if not number:
        return f"error: {len(found)} {old[:20]} here, tried\n{left(task, done)}"
    shown, start, end = found[number - 1]
    at = task["lines"][shown]
    lines[at] = replaced(lines[at], start, end, new)
    path = ROOT / task["file"]
    text = path.read_text().splitlines(keepends=True)
    text[task["start"] : task["start"] + len(lines)] = [f"{line}\n" for line in lines]
    path.write_text("".join(text))
    done.append([old, new, number])
    _TRIED.write_text(json.dumps(done))
    result = probe(task["test"])
    return result if result == "pass" else f"{result}\n{left(task, done)}"


def tried() -> list[Any]:
    """The edits so far."""
    return list(json.loads(_TRIED.read_text())) if _TRIED.exists() else []


def left(task: dict[str, Any], done: list[Any]) -> str:
    """The words with an edit that was not tried yet."""
    return f"left: {' '.join(untried(task, done)[:_MAX_WORDS])}"


def untried(task: dict[str, Any], done: list[Any]) -> list[str]:
    """Those words."""
    return list(dict.fromkeys(edit[0] for edit in task["edits"] if edit not in done))


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1], sys.argv[2:]) + "\n")
