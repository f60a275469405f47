"""Sessions that others recorded as rollouts: text without ids, of origin `api`."""

from collections.abc import Callable, Iterator
from pathlib import Path

from katcore.schema.rollout import Rollout
from katcore.trajectory.importer.atif import read_atif
from katcore.trajectory.importer.claude_code import read_claude_code
from katcore.trajectory.importer.opencode import read_opencode
from katcore.trajectory.importer.verifiers import read_verifiers


def _one(read: Callable[[Path], Rollout]) -> Callable[[Path], Iterator[Rollout]]:
    def rollouts(path: Path) -> Iterator[Rollout]:
        yield read(path)

    return rollouts


IMPORTERS: dict[str, Callable[[Path], Iterator[Rollout]]] = {
    "atif": _one(read_atif),
    "claude-code": _one(read_claude_code),
    "opencode": _one(read_opencode),
    "verifiers": read_verifiers,
}
"""What reads the files of each kind."""

__all__ = ["IMPORTERS", "read_atif", "read_claude_code", "read_opencode", "read_verifiers"]
