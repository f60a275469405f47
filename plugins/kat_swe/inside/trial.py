"""Try mutants, one forked process each: what each of their tests says.

`trial.py IN OUT`, where IN is [{"id", "file", "text", "tests"}] and OUT becomes {"id": ["pass", ...]}.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from kat_swe.inside import probe
from kat_swe.inside.shared import HANGS


def attempt(mutant: dict[str, Any]) -> list[str]:
    """The results of one mutant; shorter than its tests if it hung or died."""
    path = probe.ROOT / mutant["file"]
    original = path.read_bytes()
    read, write = os.pipe()
    path.write_text(mutant["text"])
    child = os.fork()
    if not child:
        _work(mutant["tests"], write)
    os.close(write)
    with open(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    path.write_bytes(original)
    results: list[str] = json.loads(data) if data else []
    return results


def _work(tests: list[dict[str, Any]], write: int) -> None:
    results = []
    try:
        probe.limit()
        for test in tests:
            results.append(probe.probe(test))
            if results[-1] == HANGS:
                break
        os.write(write, json.dumps(results).encode())
    finally:
        os._exit(0)


def main() -> None:
    """Try them all."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    mutants = json.loads(Path(sys.argv[1]).read_bytes())
    results = {mutant["id"]: attempt(mutant) for mutant in mutants}
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
