"""What holds for the whole tree: hooks are documented, and no file names a machine it was made on."""

import inspect
import re
import subprocess
from pathlib import Path

import pytest

from katcore.plugin import hookspecs

ROOT = Path(__file__).parents[2]
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("katcore_"))
_ELSEWHERE = re.compile(r"/(?:home|root|Users)/[\w.-]+/|/tmp/bash|/work/(?:main|shared)")
_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".cfg", ".txt", ".json"}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(hookspecs, name))


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_in_the_reference(name: str) -> None:
    page = ROOT / "docs" / "reference" / "hooks.md"
    assert not page.exists() or name in page.read_text()


def test_no_file_names_a_machine_it_was_made_on() -> None:
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    folders = ("katcore/", "plugins/", "dags/", "docs/", "tests/", "scripts/", "examples/")
    found = [
        f"{name}: {match.group()}"
        for name in listed
        if (name.startswith(folders) or "/" not in name) and Path(name).suffix in _SUFFIXES
        if (ROOT / name).exists() and name != "tests/house/test_tree.py"
        for match in _ELSEWHERE.finditer((ROOT / name).read_text(errors="replace"))
    ]
    assert not found
