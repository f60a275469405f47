"""Snapshots of local sandboxes are layers on disk: gone with their context, or with who was killed."""

from pathlib import Path

import pytest

from kat_sandboxes import reap
from kat_sandboxes.local import LocalBackend, LocalSandbox
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import output

pytestmark = pytest.mark.asyncio(loop_scope="module")


def layers(images: Path) -> list[Path]:
    return list(images.glob("layers/snapshot-*"))


async def test_the_layer_is_there_as_long_as_the_snapshot(
    backend: LocalBackend, plain: SandboxSpec, images: Path
) -> None:
    async with backend.open(plain) as sandbox:
        assert isinstance(sandbox, LocalSandbox)
        await output(sandbox, "echo x > file; rm /etc/hosts")
        async with sandbox.snapshot() as name:
            (layer,) = layers(images)
            assert layer.name == name
            assert (layer / "work" / "file").read_text() == "x\n"
            assert (layer / "etc" / "hosts").is_char_device()
    assert layers(images) == []


async def test_what_a_killed_process_left_is_swept_and_no_more(tmp_path: Path) -> None:
    for name in ("snapshot-katcore-dead-1", "snapshot-katcore-deadly-1", "other"):
        (tmp_path / "layers" / name).mkdir(parents=True)
    reap.sweep("katcore-dead", tmp_path)
    left = {path.name for path in (tmp_path / "layers").iterdir()}
    assert left == {"snapshot-katcore-deadly-1", "other"}
