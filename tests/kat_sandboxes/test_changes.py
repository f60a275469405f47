"""What was changed in one sandbox is the same in the next."""

import io
import tarfile

import pytest

from kat_sandboxes.local import LocalBackend
from katcore.protocols import Sandbox, SupportsChanges
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import bash, environment, output

pytestmark = pytest.mark.asyncio(loop_scope="module")

_LIST = (
    "find /work /etc /home /srv -xdev -type d -printf '%p %m\\n' -o -printf '%p %y %m %l %s\\n' 2>/dev/null"
    " | sort; cd /work; find . -type f -print0 2>/dev/null | sort -z | xargs -0r sha256sum 2>/dev/null; true"
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SandboxSpec:
    folder = tmp_path_factory.mktemp("changes")
    (folder / "files" / "sub" / "deep").mkdir(parents=True)
    for name in ("a", "b", "sub/c", "sub/deep/d"):
        (folder / "files" / name).write_text(name)
    (folder / "files" / "link").symlink_to("a")
    return SandboxSpec(environment(folder, "FROM host\nCOPY files /work\nWORKDIR /work\n"))


async def carried(backend: LocalBackend, spec: SandboxSpec, command: str) -> tuple[str, str]:
    """The state after a command, and in a fresh sandbox to which its changes were applied."""
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        result = await bash(sandbox, command)
        assert result.exit_code == 0, result.stderr.decode()
        changes = await sandbox.changes()
        there = await output(sandbox, _LIST)
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsChanges)
        await sandbox.apply(changes)
        return there, await output(sandbox, _LIST)


@pytest.mark.parametrize(
    "command",
    [
        "true",
        "echo new > new; echo more >> a",
        "head -c 100000 /dev/urandom > binary; printf '\\0' > null; : > empty",
        "rm a; rm -r sub",
        "rm -r sub; mkdir sub; echo x > sub/other",
        "rm -r sub; echo now a file > sub",
        "rm a; mkdir a; echo x > a/x",
        "mv a z; mv sub zub",
        "ln -s /etc/passwd absolute; ln -s nowhere broken; ln -sfn b link",
        "rm link; echo a file > link",
        "rm a; ln -s sub a",
        "rm -r sub; ln -s /etc sub",
        "chmod 755 a; chmod 600 b; chmod 2775 sub; chmod 4711 sub/c",
        "chmod 000 a; chmod 111 sub/deep; chmod 000 sub",
        "mkfifo pipe; ln b hard",
        "mkdir -p /srv/x/y; echo x > /srv/x/y/z; echo '127.0.0.1 other' >> /etc/hosts; rm /etc/group",
        "touch 'with space' $'line\\nend' $'not-utf8-\\xff' ünïcode -- -dash '*'",
        "mkdir -p $(printf 'long-name-%.0s' {1..20})/$(printf 'very-%.0s' {1..40}); cd long*; cd very*; echo x > x",  # noqa: E501
        "git init -q . && git add -A && git commit -qm x && git checkout -qb other",
    ],
)
async def test_changes_make_the_same_state_elsewhere(
    backend: LocalBackend, spec: SandboxSpec, command: str
) -> None:
    there, here = await carried(backend, spec, command)
    assert here.splitlines() == there.splitlines()


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
