"""Judge a repair. Runs at /tests in a fresh sandbox to which the agent's changes were applied.

Only the one function counts as the agent's work: every other file is compared with what it was, additions
are removed, and tests that the agent changed are a failure. The failing test comes first, so that most
failures are cheap; the suite (held-out tasks) comes last.
"""

import ast
import json
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kat_swe.inside import probe
from kat_swe.inside.shared import digest

_SPEC = Path("/tests/spec.json")
_REWARD = Path("/logs/verifier/reward.txt")
_REFUSED = frozenset(
    (
        "open", "exec", "eval", "compile", "input", "breakpoint", "exit", "quit", "globals", "locals", "vars",
        "getattr", "setattr", "delattr", "os", "sys",
    )
)  # fmt: skip


def tampered(spec: dict[str, Any]) -> str:
    """The first file that is not as it was; what was added is removed."""
    known = spec["files"]
    for folder, _, names in os.walk(probe.ROOT):
        for name in names:
            path = Path(folder, name)
            if str(path.relative_to(probe.ROOT)) not in known or path.is_symlink():
                path.unlink()
    for name, wanted in known.items():
        path = probe.ROOT / name
        if not path.is_file() or (wanted and digest(path.read_bytes()) != wanted):
            return str(name)
    return ""


def refusal(spec: dict[str, Any]) -> str:
    """Why the changed module is no repair of its function; "" if it may be one."""
    lines = (probe.ROOT / spec["file"]).read_text().splitlines(keepends=True)
    start, after = spec["start"], len(lines) - spec["after"]
    around = "".join(lines[:start] + lines[after:]).encode()
    if after < start or digest(around) != spec["around"]:
        return "changed outside the function"
    try:
        new = ast.parse(textwrap.dedent("".join(lines[start:after])))
    except SyntaxError:
        return "does not compile"
    old = ast.parse(textwrap.dedent(spec["given"]))
    if len(new.body) != 1 or getattr(new.body[0], "name", "") != getattr(old.body[0], "name", ""):
        return "is another function"
    added = _words(new) - _words(old)
    bad = sorted(word for word in added if word in _REFUSED or word.startswith("__"))
    return f"uses {bad[0]}" if bad else ""


def _words(tree: ast.AST) -> set[str]:
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words.add("__import__")
    return words


class Counter:
    """A pytest plugin that leaves out what is unstable, and counts what passes."""

    def __init__(self, unstable: list[str]) -> None:
        self._unstable = frozenset(unstable)
        self.failed = ""
        self.num = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out unstable tests."""
        items[:] = [item for item in items if item.nodeid not in self._unstable]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count."""
        if report.failed:
            self.failed = self.failed or report.nodeid
        elif report.when == "call" and report.passed:
            self.num += 1


def suite_failure(suite: dict[str, Any], code: str) -> str:
    """The first test of the whole suite that fails."""
    sys.path.insert(0, str(probe.ROOT / code))
    counter = Counter(suite["unstable"])
    options = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-c", os.devnull]
    options += ["--rootdir", str(probe.ROOT), "--continue-on-collection-errors", "--no-header"]
    pytest.main([*options, "--tb=no", *suite["paths"]], plugins=[counter])
    if counter.failed or counter.num != suite["passed"]:
        return counter.failed or f"{counter.num} of {suite['passed']} passed"
    return ""


def verdict(spec: dict[str, Any]) -> str:
    """Why it fails; "" if it passes."""
    problem = tampered(spec) or refusal(spec)
    if problem:
        return problem
    for test in spec["tests"]:
        result = probe.probe(test)
        if result != "pass":
            return f"{test['name']}: {result}"
    if "suite" in spec:
        return suite_failure(spec["suite"], spec["code"])
    return ""


def main() -> None:
    """Write the reward: 0 until all has passed."""
    spec = json.loads(_SPEC.read_text())
    _REWARD.write_text("0\n")
    probe.limit()
    output = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    problem = verdict(spec)
    _REWARD.write_text("0\n" if problem else "1\n")
    os.write(output, f"{problem or 'pass'}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
