"""What a repository in an image knows of later than its HEAD is taken out, before an agent sees it.

A task that was made of a repository's past is made of a clone that knows the future, the repair above all.
"""

import os
from collections.abc import Iterable
from pathlib import Path

_PARTS = ({"objects", "refs"}, {"info", "pack"})
"""Folders that are beside each other in any repository, and in any store of objects."""
SCRIPT = Path(__file__).with_name("history.sh").read_text()
"""Run by bash as root, once in each new image; it fails where a repository cannot be read."""


def has_repository(layer: Path) -> bool:
    """Whether there is a git repository in a folder, with a working tree or bare, or only its objects."""
    return any(is_repository(folders, files) for _, folders, files in os.walk(layer))


def is_repository(folders: Iterable[str], files: Iterable[str]) -> bool:
    """Whether a folder is or has one, by the names of the folders and files in it."""
    inner = {*folders}
    return ".git" in (*inner, *files) or any(part <= inner for part in _PARTS)
