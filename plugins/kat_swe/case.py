"""A bug that tests notice: a wrong function, its repair, and which tests fail and pass with it."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kat_swe import release
from kat_swe.function import functions
from kat_swe.ingest import Ingested, Ingester
from kat_swe.inside.shared import HANGS
from kat_swe.mutant import Mutant, mutants
from kat_swe.operator import edits

_MAX_TESTS = 16
_MAX_TESTS_S = 0.12
_MAX_EDITS = 24
_MAX_PROMPT = 410


@dataclass(frozen=True, slots=True)
class Case:
    """One bug. `fails` and `passes` are keys of tests; `message` is how the first of `fails` fails."""

    ingested: Ingested
    mutant: Mutant
    message: str
    fails: tuple[str, ...]
    passes: tuple[str, ...]

    @property
    def id(self) -> str:
        """Unique among all cases of all packages."""
        return f"{self.ingested.package.name}-{self.mutant.id}"

    @property
    def test(self) -> dict[str, Any]:
        """How to run the failing test."""
        return self.ingested.tests[self.fails[0]]


async def cases(ingester: Ingester, ingested: Ingested) -> list[Case]:
    """All cases of a package: mutants, and what later releases repaired."""
    made: dict[str, tuple[Mutant, list[str]]] = {}
    async for mutant, tests in _mutants(ingester, ingested):
        made.setdefault(mutant.id, (mutant, tests))
    jobs = [
        {
            "id": key,
            "file": mutant.function.file,
            "text": mutant.text,
            "tests": [runnable(ingested.tests[test]) for test in tests],
        }
        for key, (mutant, tests) in made.items()
    ]
    found = await ingester.trials(ingested.image, jobs)
    listed = (
        _case(ingested, mutant, tests, found.get(key, [])) for key, (mutant, tests) in made.items()
    )
    return [case for case in listed if case]


async def _mutants(
    ingester: Ingester, ingested: Ingested
) -> AsyncIterator[tuple[Mutant, list[str]]]:
    """Lets others work between two functions; not in a thread, where `ast.parse` is not safe."""
    older = [ingester.fetch(item) for item in ingested.package.older]
    by_function = _callers(ingested)
    for file, text in ingested.modules():
        for function in functions(file, text):
            tests = by_function.get(function.key, [])
            if not tests:
                continue
            await asyncio.sleep(0)
            real = (release.repaired(folder, text, function) for folder in older)
            for mutant in [*filter(None, real), *mutants(text, function)]:
                if len(edits(mutant.function)) <= _MAX_EDITS and mutant.repair.is_plain:
                    yield mutant, tests


def _callers(ingested: Ingested) -> dict[str, list[str]]:
    """By function: the quickest tests that call it."""
    by_function: dict[str, list[str]] = {}
    for key, test in sorted(
        ingested.tests.items(), key=lambda item: (round(item[1]["seconds"], 2), item[0])
    ):
        for function in test["called"]:
            by_function.setdefault(function, []).append(key)
    return {function: _affordable(ingested, keys) for function, keys in by_function.items()}


def _affordable(ingested: Ingested, keys: Sequence[str]) -> list[str]:
    chosen, seconds = [], 0.0
    for key in keys[:_MAX_TESTS]:
        seconds += ingested.tests[key]["seconds"]
        if seconds > _MAX_TESTS_S:
            break
        chosen.append(key)
    return chosen


def _case(
    ingested: Ingested, mutant: Mutant, tests: Sequence[str], results: Sequence[str]
) -> Case | None:
    if len(results) != len(tests) or HANGS in results:
        return None
    outcome = dict(zip(tests, results, strict=True))
    fails = [key for key in tests if outcome[key] != "pass"]
    if not fails or len(mutant.function.text) + len(outcome[fails[0]]) > _MAX_PROMPT:
        return None
    passes = tuple(key for key in tests if outcome[key] == "pass")
    return Case(ingested, mutant, outcome[fails[0]], tuple(fails), passes)


def runnable(test: dict[str, Any]) -> dict[str, str]:
    """What is needed to run a test."""
    return {key: test[key] for key in ("code", "path", "module", "class", "name")}


def sources(listed: Iterable[Case]) -> set[str]:
    """Every function source, right and wrong, that cases are about."""
    return {
        function.text for case in listed for function in (case.mutant.function, case.mutant.right)
    }
