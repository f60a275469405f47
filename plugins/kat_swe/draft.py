"""A case as a task directory: prompt, sandbox, hidden tests, and ways to solve it."""

import json
import random
from typing import Any

from kat_swe.case import Case, runnable
from kat_swe.ingest import INSIDE, cached_name
from kat_swe.inside.edit import places
from kat_swe.inside.shared import digest
from kat_swe.operator import Edit, edits
from katcore.dataset.harbor import Draft

_TEST = "PYTHONPATH=/tests python3 /tests/kat_swe/inside/grade.py\n"
_MAX_FAILS = 4
_MAX_PASSES = 8
_MAX_WRONG = 3


def draft(task_id: str, case: Case, *, needs_reading: bool, is_held_out: bool) -> Draft:
    """A case as a task."""
    draw = random.Random(case.id)
    look = ["show"] if needs_reading else []
    repair = case.mutant.repair.command
    tries = [*(edit.command for edit in _wrong(case, draw)), repair]
    ways = [
        ("hindsight", [*look, repair, "submit"]),
        ("search", [*look, *tries, "submit"]),
    ]
    return Draft(
        task_id,
        "swe",
        prompt(case, needs_reading=needs_reading),
        environment(case),
        tests(case, is_held_out=is_held_out),
        ways,
        group=case.ingested.package.name,
        traits={
            "kind": "release" if case.mutant.operator == "release" else "mutant",
            "needs_reading": str(needs_reading).lower(),
            "operator": case.mutant.operator,
            "function": case.mutant.function.name,
        },
    )


def prompt(case: Case, *, needs_reading: bool) -> str:
    """What the agent is told: where, what the failing test says, and mostly the source."""
    function = case.mutant.function
    head = f"Fix {function.name} in {function.file.rpartition('/')[2]}."
    body = "Its source: show" if needs_reading else case.mutant.function.text
    return f"{head}\n{body}\n{case.message}"


def _invited(case: Case) -> list[Edit]:
    """The edits that the function invites, in the order of its text.

    For a mutant one of them repairs it; for a release only where an operator happens to make the repair.
    """
    function = case.mutant.function
    found = [edit for edit in edits(function) if edit.is_plain]
    return sorted(found, key=lambda edit: (next(places(function.shown, edit.old)), edit))


def _wrong(case: Case, draw: random.Random) -> list[Edit]:
    """Up to three of them that do not repair it."""
    repair = case.mutant.repair
    others = [edit for edit in _invited(case) if edit.command != repair.command]
    return draw.sample(others, min(len(others), draw.randint(1, _MAX_WRONG)))


def environment(case: Case) -> dict[str, bytes]:
    """The package's image, with the wrong module over the right one, and over its compiled file."""
    function = case.mutant.function
    folder, _, name = function.file.rpartition("/")
    compiled = f"{folder}/__pycache__/{cached_name(name)}".lstrip("/")
    task = {
        "file": function.file,
        "start": function.start,
        "source": function.source,
        "lines": function.lines,
        "edits": [(edit.old, edit.new, edit.number) for edit in _invited(case)],
        "test": runnable(case.test),
    }
    dockerfile = (
        f"FROM {case.ingested.image}\nCOPY {name} {function.file}\nCOPY empty {compiled}\n"
        "COPY task.json shown /opt/swe/\nWORKDIR /pkg\n"
    )
    return {
        "Dockerfile": dockerfile.encode(),
        name: case.mutant.text.encode(),
        "empty": b"",
        "task.json": json.dumps(task).encode(),
        "shown": f"{function.text}\n".encode(),
    }


def tests(case: Case, *, is_held_out: bool) -> dict[str, bytes]:
    """The judge and what it has to know."""
    function = case.mutant.function
    lines = case.mutant.text.splitlines(keepends=True)
    around = "".join(lines[: function.start] + lines[function.end :])
    files = dict(case.ingested.files)
    folder, _, name = function.file.rpartition("/")
    files[function.file] = ""
    files.pop(f"{folder}/__pycache__/{cached_name(name)}".lstrip("/"), None)
    keys = case.fails[:_MAX_FAILS] + (() if is_held_out else case.passes[:_MAX_PASSES])
    spec: dict[str, Any] = {
        "file": function.file,
        "start": function.start,
        "after": len(lines) - function.end,
        "around": digest(around.encode()),
        "given": "\n".join(function.source) + "\n",
        "code": case.ingested.code,
        "files": files,
        "tests": [runnable(case.ingested.tests[key]) for key in keys],
    }
    if is_held_out:
        spec["suite"] = {
            name: case.ingested.suite[name] for name in ("unstable", "passed", "paths")
        }
    return {
        "test.sh": _TEST.encode(),
        **{
            f"kat_swe/inside/{name}": (INSIDE / name).read_bytes()
            for name in ("grade.py", "probe.py", "shared.py")
        },
        "spec.json": json.dumps(spec).encode(),
    }
