"""Run a package's whole suite, and note which test calls which function of the package.

`survey.py CODE TEST_PATHS...` writes /tmp/survey.json. Calls are seen by `sys.setprofile`, so the table is
function by function. The suite runs twice: what does not pass both times is not relied upon. Tests that need
no fixture also run without pytest, as the agent's tool does.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kat_swe.inside import probe


class Survey:
    """A pytest plugin: results, and with `is_watching` the functions called."""

    def __init__(self, *, is_watching: bool) -> None:
        self.is_watching = is_watching
        self.ids: dict[str, bool] = {}
        self.tests: dict[str, dict[str, Any]] = {}
        self._called: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Passed is what passes in all phases."""
        is_good = report.outcome == "passed" and not hasattr(report, "wasxfail")
        self.ids[report.nodeid] = is_good and self.ids.get(report.nodeid, True)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        """Watch the test itself, not its setup."""
        self._called = set()
        if self.is_watching:
            sys.setprofile(self._profile)
        yield
        sys.setprofile(None)
        if self.is_watching and hasattr(item, "originalname") and _is_plain(item):
            owner = item.cls.__name__ if item.cls else ""
            key = f"{item.module.__name__}:{owner}:{item.originalname}"
            record = {
                "code": sys.argv[1],
                "path": _import_root(item),
                "module": item.module.__name__,
                "class": owner,
                "name": item.originalname,
                "called": [],
            }
            record = self.tests.setdefault(key, record)
            record["called"] = sorted({*record["called"], *self._called})

    def _profile(self, frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith("/pkg/"):
            self._called.add(f"{frame.f_code.co_filename[5:]}:{frame.f_code.co_firstlineno}")


def _is_plain(item: Any) -> bool:
    given = getattr(getattr(item, "callspec", None), "params", {})
    return all(name in given for name in item._fixtureinfo.argnames)


def _import_root(item: Any) -> str:
    path = Path(item.module.__file__)
    for _ in item.module.__name__.split("."):
        path = path.parent
    return str(path.relative_to(probe.ROOT))


def suite(code: str, paths: list[str], plugin: object) -> None:
    """Run pytest on the suite, the same way as when a task is judged."""
    sys.path.insert(0, str(probe.ROOT / code))
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-c", os.devnull]
    options += ["--rootdir", str(probe.ROOT), "--continue-on-collection-errors"]
    pytest.main([*options, *paths], plugins=[plugin])


def _forked(name: str, work: Any) -> Any:
    path = Path(f"/tmp/{name}.json")
    child = os.fork()
    if not child:
        try:
            path.write_text(json.dumps(work()))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return json.loads(path.read_text())


def _watch() -> Any:
    survey = Survey(is_watching=True)
    suite(sys.argv[1], sys.argv[2:], survey)
    return survey.ids, survey.tests


def _again() -> Any:
    survey = Survey(is_watching=False)
    started = time.process_time()
    suite(sys.argv[1], sys.argv[2:], survey)
    return survey.ids, time.process_time() - started


def _singly(tests: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Processor seconds of each test that passes."""
    found = {}
    for key, test in tests.items():
        result = probe.probe(test)
        started = time.process_time()
        if result == "pass" and probe.probe(test) == "pass":
            found[key] = time.process_time() - started
    return found


def main() -> None:
    """All of it."""
    ids, tests = _forked("first", _watch)
    again, seconds = _forked("second", _again)
    singly = _forked("third", lambda: _singly(tests))
    unstable = sorted(key for key in {*ids, *again} if not (ids.get(key) and again.get(key)))
    kept = {key: tests[key] | {"seconds": round(singly[key], 4)} for key in sorted(singly)}
    stable = [key for key in ids if key not in set(unstable)]
    suite_of = {
        "passed": len(stable),
        "unstable": unstable,
        "paths": list(dict.fromkeys(key.partition("::")[0] for key in stable)),
        "seconds": seconds,
    }
    result = {"suite": suite_of, "tests": kept}
    Path("/tmp/survey.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
