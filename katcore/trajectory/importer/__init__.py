"""Sessions that others recorded as rollouts: text without ids, of origin `api`, and without a verdict."""

from katcore.trajectory.importer.atif import read_atif
from katcore.trajectory.importer.claude_code import read_claude_code
from katcore.trajectory.importer.opencode import read_opencode

__all__ = ["read_atif", "read_claude_code", "read_opencode"]
