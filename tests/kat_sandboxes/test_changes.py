"""Changes, beyond the contract: what is in the archive, and repositories."""

import io
import tarfile

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.protocols import Sandbox, SupportsChanges
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import environment, output

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SandboxSpec:
    folder = tmp_path_factory.mktemp("changes")
    (folder / "files" / "sub" / "deep").mkdir(parents=True)
    for name in ("a", "b", "sub/c", "sub/deep/d"):
        (folder / "files" / name).write_text(name)
    (folder / "files" / "link").symlink_to("a")
    return SandboxSpec(environment(folder, "FROM host\nCOPY files /work\nWORKDIR /work\n"))


async def test_a_repository_arrives(backend: LocalBackend, spec: SandboxSpec) -> None:
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await output(
            sandbox, "git init -q . && git add -A && git commit -qm x && git checkout -qb o"
        )
        changes = await sandbox.changes()
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await sandbox.apply(changes)
        assert await output(sandbox, "git status --porcelain -b; git log --format=%s") == "## o\nx"


async def test_a_file_of_the_image_that_is_deleted_stays_so(
    backend: LocalBackend, spec: SandboxSpec
) -> None:
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await output(sandbox, "rm /etc/group")
        changes = await sandbox.changes()
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await sandbox.apply(changes)
        await output(sandbox, "test ! -e /etc/group")


async def test_contents_and_times_arrive(backend: LocalBackend, spec: SandboxSpec) -> None:
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await output(sandbox, "touch -d 2001-02-03T04:05:06Z a; echo new > b")
        changes = await sandbox.changes()
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await sandbox.apply(changes)
        assert await output(sandbox, "date -ur a +%F; cat b") == "2001-02-03\nnew"


async def test_nothing_changed_is_an_empty_archive(sandbox: Sandbox) -> None:
    assert isinstance(sandbox, SupportsChanges)
    await output(sandbox, "cat /etc/passwd; ls -R /work; echo x > /tmp/x; python3 -c 'import json'")
    with tarfile.open(fileobj=io.BytesIO(await sandbox.changes())) as tar:
        assert tar.getnames() == []


async def test_changes_of_changes_are_the_same(backend: LocalBackend, spec: SandboxSpec) -> None:
    async with backend.open(spec) as one, backend.open(spec) as two:
        assert isinstance(one, SupportsChanges)
        assert isinstance(two, SupportsChanges)
        await output(one, "rm a; echo x > sub/new; ln -s b l; chmod +x b; rm -r sub/deep")
        first = await one.changes()
        await two.apply(first)
        assert sorted(_entries(first)) == sorted(_entries(await two.changes()))


def _entries(archive: bytes) -> list[tuple[str, bytes, int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return [
            (item.name, item.type, item.mode, (tar.extractfile(item) or io.BytesIO()).read())
            for item in tar
            if item.isfile() or item.issym() or item.pax_headers
        ]
