"""A scaffold's files: shown in the sandbox, read-only, from one folder alone."""

from dataclasses import replace
from pathlib import Path

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.errors import SandboxError
from katcore.schema.task import SandboxSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_tools_are_shown_read_only_and_are_no_change(
    backend: LocalBackend, plain: SandboxSpec
) -> None:
    tools = backend._scaffolds / "agent-1"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "run").write_text("#!/bin/sh\necho ran\n")
    (tools / "run").chmod(0o755)
    async with backend.open(replace(plain, tools=tools)) as sandbox:
        assert (await sandbox.exec(["/opt/scaffold/run"])).stdout == b"ran\n"
        result = await sandbox.exec(["bash", "-c", "echo x >> /opt/scaffold/run"])
        assert b"Read-only file system" in result.stderr
        changes = await sandbox.changes()  # type: ignore[attr-defined]
        assert b"scaffold" not in changes
    assert "x" not in (tools / "run").read_text().split("\n")[-1]


async def test_tools_from_anywhere_else_are_refused(
    backend: LocalBackend, plain: SandboxSpec, tmp_path: Path
) -> None:
    with pytest.raises(SandboxError, match="shown from"):
        async with backend.open(replace(plain, tools=tmp_path)):
            pass
