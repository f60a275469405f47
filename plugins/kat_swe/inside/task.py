"""The agent's tools, run inside the sandbox: `t` and `fix "OLD NEW" [N]`.

`fix` replaces the Nth OLD of the function (the first by default), or removes it where there is no NEW.
`task.json` says where the function is and which test fails. `fix` starts from the function as it was given,
so that a wrong try needs no undoing.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kat_swe.inside.edit import places, replaced
from kat_swe.inside.probe import ROOT, limit, probe

_USAGE = 'usage: fix "OLD NEW" [N]'


def main(verb: str, arguments: list[str]) -> str:
    """The answer to a command."""
    task = json.loads(Path("/opt/swe/task.json").read_text())
    limit()
    if verb == "t":
        return probe(task["test"])
    return fix(task, arguments)


def fix(task: dict[str, Any], request: list[str]) -> str:
    """Make one edit and run the failing test."""
    words = request[0].split(None, 1) if request else []
    which = request[1] if len(request) > 1 else "1"
    if not words or not which.isdecimal() or len(request) > 2:
        return _USAGE
    old, new = words[0], words[1] if len(words) > 1 else ""
    lines = list(task["source"])
    found = list(places((lines[at] for at in task["lines"]), old))
    if not 1 <= int(which) <= len(found):
        return f"error: {len(found) or 'no'} {old[:20]} here"
    shown, start, end = found[int(which) - 1]
    at = task["lines"][shown]
    lines[at] = replaced(lines[at], start, end, new)
    path = ROOT / task["file"]
    text = path.read_text().splitlines(keepends=True)
    text[task["start"] : task["start"] + len(lines)] = [f"{line}\n" for line in lines]
    path.write_text("".join(text))
    return probe(task["test"])


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1], sys.argv[2:]) + "\n")
