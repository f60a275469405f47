"""Changes: what was changed in one sandbox is the same in the next."""

from pathlib import Path

import pytest

from katcore.protocols import Sandbox, SandboxBackend, SupportsChanges
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import Declared, environment, needs, output, sh

_LIST = (
    "find . /etc /home /srv -xdev -type d -printf '%p %m\\n' -o -printf '%p %y %m %l %s\\n' 2>/dev/null"
    " | sort; find . -type f -print0 2>/dev/null | sort -z | xargs -0r sha256sum 2>/dev/null; true"
)
"""Kinds, modes, targets and sizes of all files, and what is in them; the working folder has to be WORKDIR."""


class Changes(Declared):
    """`changes` and `apply`."""

    @pytest.fixture
    def filled(self, tmp_path: Path) -> SandboxSpec:
        """A machine whose WORKDIR has files of the image."""
        dockerfile = f"{self.dockerfile}COPY files {self.workdir}\n"
        folder = environment(tmp_path / "filled", dockerfile)
        (folder / "files" / "sub" / "deep").mkdir(parents=True)
        for name in ("a", "b", "sub/c", "sub/deep/d"):
            (folder / "files" / name).write_text(name)
        (folder / "files" / "link").symlink_to("a")
        return SandboxSpec(folder)

    @pytest.mark.parametrize(
        "command",
        [
            "true",
            "echo new > new; echo more >> a",
            "head -c 100000 /dev/urandom > binary; printf '\\000' > null; : > empty",
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
            "mkdir -p /srv/x/y; echo x > /srv/x/y/z; echo '127.0.0.1 other' >> /etc/hosts",
            "touch 'a b' \"$(printf 'line\\nend')\" \"$(printf 'not-utf8-\\377')\" ünïcode -- -dash '*'",
            "d=$(printf 'long-%.0s' $(seq 40))/$(printf 'very-%.0s' $(seq 40)); mkdir -p $d; echo x > $d/x",
        ],
    )
    @needs("has_changes")
    async def test_they_make_the_same_state_elsewhere(
        self, backend: SandboxBackend, filled: SandboxSpec, command: str
    ) -> None:
        async with backend.open(filled) as sandbox:
            result = await sh(sandbox, command)
            assert result.exit_code == 0, result.stderr.decode()
            archive = await _changes(sandbox)
            there = await output(sandbox, _LIST)
        async with backend.open(filled) as sandbox:
            await _apply(sandbox, archive)
            assert (await output(sandbox, _LIST)).splitlines() == there.splitlines()

    @needs("has_changes")
    async def test_asking_changes_nothing(
        self, backend: SandboxBackend, filled: SandboxSpec
    ) -> None:
        async with backend.open(filled) as sandbox:
            await output(sandbox, "echo new > b; chmod 000 sub")
            before = await output(sandbox, _LIST)
            await _changes(sandbox)
            assert await output(sandbox, _LIST) == before

    @needs("has_changes")
    async def test_what_a_file_holds_is_found_in_them(self, sandbox: Sandbox) -> None:
        text = b"#!/bin/sh\n# a word to look for\n" * 3
        await sandbox.write("/solution/file", text)
        assert (await _changes(sandbox)).count(text) == 1

    @needs("has_changes")
    async def test_they_can_be_passed_on(
        self, backend: SandboxBackend, filled: SandboxSpec
    ) -> None:
        async with backend.open(filled) as one, backend.open(filled) as two:
            await output(one, "rm a; echo x > sub/new; ln -s b l; chmod +x b; rm -r sub/deep")
            await _apply(two, await _changes(one))
            passed_on = await _changes(two)
            there = await output(one, _LIST)
        async with backend.open(filled) as three:
            await _apply(three, passed_on)
            assert await output(three, _LIST) == there

    @needs("has_changes")
    async def test_what_is_in_tmp_is_none(
        self, backend: SandboxBackend, filled: SandboxSpec
    ) -> None:
        async with backend.open(filled) as one, backend.open(filled) as two:
            await output(one, "echo x > /tmp/passing; echo x > kept")
            await _apply(two, await _changes(one))
            assert await output(two, "ls /tmp; cat kept") == "x"


async def _changes(sandbox: Sandbox) -> bytes:
    assert isinstance(sandbox, SupportsChanges)
    return await sandbox.changes()


async def _apply(sandbox: Sandbox, changes: bytes) -> None:
    assert isinstance(sandbox, SupportsChanges)
    await sandbox.apply(changes)
