"""The agent's tools, run inside the sandbox: `t` and `fix "LINE OLD NEW"`.

`task.json` says where the function is and which test fails. `fix` starts from the function as it was given,
so that a wrong try needs no undoing.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kat_swe.inside.edit import replaced
from kat_swe.inside.probe import ROOT, limit, probe


def main(verb: str, arguments: list[str]) -> str:
    """The answer to a command."""
    task = json.loads(Path("/opt/swe/task.json").read_text())
    limit()
    if verb == "t":
        return probe(task["test"])
    return fix(task, " ".join(arguments))


def fix(task: dict[str, Any], request: str) -> str:
    """Make one edit and run the failing test."""
    words = request.split(None, 2)
    if len(words) < 2 or not words[0].isdigit():
        return 'usage: fix "LINE OLD NEW"'
    number, old, new = int(words[0]), words[1], words[2] if len(words) > 2 else ""
    if not 1 <= number <= len(task["lines"]):
        return f"error: no line {number}"
    lines = list(task["source"])
    at = task["lines"][number - 1]
    changed = replaced(lines[at], old, new)
    if changed is None:
        return f"error: no {old[:20]} in line {number}"
    lines[at] = changed
    path = ROOT / task["file"]
    text = path.read_text().splitlines(keepends=True)
    text[task["start"] : task["start"] + len(lines)] = [f"{line}\n" for line in lines]
    path.write_text("".join(text))
    return probe(task["test"])


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1], sys.argv[2:]) + "\n")
