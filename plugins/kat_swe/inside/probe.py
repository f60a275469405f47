"""Run single test functions without pytest's machinery, and say in one short line how one failed."""

import importlib
import itertools
import linecache
import re
import resource
import signal
import sys
import traceback
import unittest
from pathlib import Path
from typing import Any

import pytest

from kat_swe.inside.shared import HANGS

# A compiled file is known by second and size of its source; two edits of one second may share both.
sys.dont_write_bytecode = True

ROOT = Path("/pkg")
_LIMIT_S = 0.3
_KILL_S = 20
_MEMORY = 1 << 30
_MAX_LINE = 54


class HangError(BaseException):
    """A test ran past its limit."""


def limit() -> None:
    """What not even an endless loop in C can pass: processor time and memory of this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (_KILL_S, _KILL_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def probe(test: dict[str, Any]) -> str:
    """`pass`, or `fail: ` and why."""
    for folder in (test["code"], test["path"]):
        if (path := str(ROOT / folder)) not in sys.path:
            sys.path.insert(0, path)
    signal.signal(signal.SIGPROF, _hangs)
    signal.setitimer(signal.ITIMER_PROF, _LIMIT_S, 0.1)
    try:
        _run(test)
    except HangError:
        return HANGS
    except BaseException as error:  # noqa: BLE001 - whatever a test raises is its result
        signal.setitimer(signal.ITIMER_PROF, 0)
        return f"fail: {describe(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "pass"


def _run(test: dict[str, Any]) -> None:
    module = importlib.import_module(test["module"])
    if not test["class"]:
        _run_cases(getattr(module, test["name"]), [])
        return
    owner = getattr(module, test["class"])
    if issubclass(owner, unittest.TestCase):
        owner(test["name"]).debug()
        return
    instance = owner()
    if hasattr(instance, "setup_method"):
        instance.setup_method()
    _run_cases(getattr(instance, test["name"]), getattr(owner, "pytestmark", []))


def _run_cases(function: Any, marks: list[Any]) -> None:
    """Once, or with every set of its `pytest.mark.parametrize`."""
    marks = [*getattr(function, "pytestmark", []), *marks]
    choices = [_choices(mark) for mark in marks if mark.name == "parametrize"]
    for combination in itertools.product(*choices):
        function(**dict(itertools.chain.from_iterable(combination)))


def _choices(mark: Any) -> list[list[tuple[str, Any]]]:
    names, values = mark.args[0], mark.args[1]
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    found = []
    for value in values:
        if isinstance(value, type(pytest.param(0))):
            if value.marks:
                continue
            value = value.values if len(names) > 1 else value.values[0]
        found.append(list(zip(names, value if len(names) > 1 else [value], strict=True)))
    return found


def describe(error: BaseException) -> str:
    """The line of the failed assertion, or the exception."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    message = lines[0] if lines else type(error).__name__
    if isinstance(error, AssertionError):
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if "test" in Path(frame.filename).name and frame.filename.startswith(str(ROOT)):
                message = linecache.getline(frame.filename, frame.lineno or 0).strip()
                break
    message = re.sub(r"0x[0-9a-f]+", "0x", " ".join(message.removeprefix("self.").split()))
    return message[:_MAX_LINE].strip()


def _hangs(*_: object) -> None:
    raise HangError
