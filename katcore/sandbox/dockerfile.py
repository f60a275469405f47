"""The declared subset of Dockerfile: FROM, COPY, RUN, ENV, WORKDIR.

Syntax: https://docs.docker.com/reference/dockerfile/. Whatever is outside the subset is a `TaskError`
that names the line, never ignored: an environment that silently lacks a step is another environment.
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from katcore.errors import TaskError

_SUBSET = "FROM, COPY, RUN, ENV, WORKDIR"
_LITERAL = re.compile(r"'[^']*'|\\\$")


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction after FROM. `arguments` are words, but for RUN: one shell command line."""

    verb: str
    arguments: tuple[str, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """A parsed file: where it starts from, and what it does."""

    parent: str
    steps: tuple[Step, ...] = field(default=())


def parse(path: Path) -> Dockerfile:
    """Parse a Dockerfile.

    Raises:
        TaskError: no such file, an instruction outside the subset, or wrong arguments.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    instructions = list(_instructions(text))
    if not instructions or instructions[0][1].upper() != "FROM":
        raise TaskError(f"{path}: the first instruction has to be FROM")
    steps = [_step(path, *instruction) for instruction in instructions]
    if any(step.verb == "FROM" for step in steps[1:]):
        raise TaskError(f"{path}: only one FROM; multi-stage builds are not supported")
    if len(steps[0].arguments) != 1:
        raise TaskError(f"{path}:{steps[0].line}: FROM takes one image name")
    return Dockerfile(steps[0].arguments[0], tuple(steps[1:]))


def _instructions(text: str) -> list[tuple[int, str, str]]:
    found: list[tuple[int, str, str]] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or (line.lstrip().startswith("#")):
            continue
        start = start if pending else number
        pending += line.removesuffix("\\").strip() + " "
        if not line.endswith("\\"):
            verb, _, rest = pending.strip().partition(" ")
            found.append((start, verb, rest.strip()))
            pending = ""
    if pending:
        verb, _, rest = pending.strip().partition(" ")
        found.append((start, verb, rest.strip()))
    return found


def _step(path: Path, line: int, verb: str, rest: str) -> Step:
    verb = verb.upper()
    where = f"{path}:{line}"
    if verb == "RUN":
        if not rest or rest.startswith(("[", "--")):
            raise TaskError(f"{where}: RUN takes one shell command, without flags or JSON form")
        return Step(verb, (rest,), line)
    if verb not in _SUBSET.split(", "):
        raise TaskError(f"{where}: {verb} is not supported here; what is: {_SUBSET}")
    try:
        words = tuple(shlex.split(rest))
    except ValueError as error:
        raise TaskError(f"{where}: {error}") from error
    if "$" in _LITERAL.sub("", rest):
        raise TaskError(f"{where}: {verb}: variables are not replaced here; write their values")
    if any(word.startswith("--") for word in words):
        raise TaskError(f"{where}: {verb} with flags is not supported here")
    if verb == "COPY" and len(words) < 2:
        raise TaskError(f"{where}: COPY takes sources and a destination")
    if verb == "WORKDIR" and len(words) != 1:
        raise TaskError(f"{where}: WORKDIR takes one path")
    if verb == "ENV" and (not words or any("=" not in word for word in words)):
        raise TaskError(f"{where}: ENV takes NAME=value")
    return Step(verb, words, line)
