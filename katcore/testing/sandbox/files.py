"""Files: exact, large, oddly named, forbidden; and no path that leads out."""

import asyncio
import hashlib
import random
from pathlib import Path

import pytest

from katcore.protocols import Sandbox
from katcore.testing.sandbox.base import Declared, output

_LARGE_BYTES = 24 << 20


class Files(Declared):
    """`read` and `write`, and what commands see of them."""

    @pytest.mark.parametrize("data", [b"", b"\0", b"no line end", b"\r\n\n", bytes(range(256))])
    async def test_what_is_written_is_read_exactly(self, sandbox: Sandbox, data: bytes) -> None:
        await sandbox.write(f"{self.workdir}/file", data)
        assert await sandbox.read(f"{self.workdir}/file") == data

    async def test_a_large_file_is_exact_both_ways(self, sandbox: Sandbox) -> None:
        data = random.Random(0).randbytes(_LARGE_BYTES)
        await sandbox.write("/tmp/large", data)
        said = await output(sandbox, "sha256sum /tmp/large; cp /tmp/large /tmp/copy")
        assert said.split()[0] == hashlib.sha256(data).hexdigest()
        assert await sandbox.read("/tmp/copy") == data

    async def test_writing_makes_the_folders(self, sandbox: Sandbox) -> None:
        await sandbox.write(f"{self.workdir}/a/b/c/file", b"x")
        assert await output(sandbox, "cat a/b/c/file") == "x"

    async def test_writing_replaces(self, sandbox: Sandbox) -> None:
        await sandbox.write(f"{self.workdir}/file", b"a longer text")
        await sandbox.write(f"{self.workdir}/file", b"short")
        assert await output(sandbox, "cat file") == "short"

    async def test_what_a_command_writes_is_read(self, sandbox: Sandbox) -> None:
        await output(sandbox, r"printf 'a\000b' > file")
        assert await sandbox.read(f"{self.workdir}/file") == b"a\0b"

    @pytest.mark.parametrize("name", ["a b", "line\nend", "日本", "-dash", "*", "'\"", "a" * 200])
    async def test_odd_names_are_names(self, sandbox: Sandbox, name: str) -> None:
        await sandbox.write(f"{self.workdir}/odd/{name}", b"x")
        assert await sandbox.read(f"{self.workdir}/odd/{name}") == b"x"
        assert (await output(sandbox, "find odd -type f -printf '%f\\0'")).strip("\0") == name

    async def test_a_file_that_is_not_there_says_so(self, sandbox: Sandbox) -> None:
        with pytest.raises(FileNotFoundError):
            await sandbox.read("/no/such/file")

    async def test_a_folder_is_no_file(self, sandbox: Sandbox) -> None:
        with pytest.raises(IsADirectoryError):
            await sandbox.read("/etc")
        with pytest.raises(IsADirectoryError):
            await sandbox.write(self.workdir, b"x")

    async def test_a_file_is_no_folder(self, sandbox: Sandbox) -> None:
        await sandbox.write(f"{self.workdir}/file", b"x")
        for path in (f"{self.workdir}/file/x", f"{self.workdir}/file/x/y"):
            with pytest.raises(NotADirectoryError):
                await sandbox.write(path, b"x")
            with pytest.raises(NotADirectoryError):
                await sandbox.read(path)

    async def test_what_its_user_may_not_is_refused(self, sandbox: Sandbox) -> None:
        await output(sandbox, "echo x > locked; chmod 000 locked")
        with pytest.raises(PermissionError):
            await sandbox.read(f"{self.workdir}/locked")
        with pytest.raises(PermissionError):
            await sandbox.write(f"{self.workdir}/locked", b"y")

    async def test_a_pipe_that_nobody_writes_to_does_not_hang(self, sandbox: Sandbox) -> None:
        await output(sandbox, "mkfifo pipe")
        async with asyncio.timeout(20):
            with pytest.raises(OSError, match="not a regular file"):
                await sandbox.read(f"{self.workdir}/pipe")
        assert await output(sandbox, "echo on") == "on"

    async def test_a_null_byte_is_no_path(self, sandbox: Sandbox) -> None:
        with pytest.raises(ValueError, match="null"):
            await sandbox.read("/a\0b")

    async def test_links_are_followed_inside(self, sandbox: Sandbox) -> None:
        await output(
            sandbox, "mkdir real; echo x > real/file; ln -s real linked; ln -s real/file l"
        )
        assert await sandbox.read(f"{self.workdir}/linked/file") == b"x\n"
        await sandbox.write(f"{self.workdir}/l", b"y")
        assert await sandbox.read(f"{self.workdir}/real/file") == b"y"

    async def test_a_link_to_itself_says_so(self, sandbox: Sandbox) -> None:
        await output(sandbox, "ln -s loop loop")
        with pytest.raises(OSError, match="symbolic links"):
            await sandbox.read(f"{self.workdir}/loop")

    async def test_links_do_not_lead_out(self, sandbox: Sandbox, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("the machine's")
        await output(sandbox, f"ln -s {target} out; ln -s ../../../../../..{target} up")
        for name in ("out", "up"):
            with pytest.raises(FileNotFoundError):
                await sandbox.read(f"{self.workdir}/{name}")
        await output(sandbox, f"mkdir -p {tmp_path}")
        for name in ("out", "up"):
            await sandbox.write(f"{self.workdir}/{name}", b"the sandbox's")
        assert target.read_text() == "the machine's"
        assert await sandbox.read(str(target)) == b"the sandbox's"

    async def test_paths_do_not_lead_out(self, sandbox: Sandbox, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("the machine's")
        paths = [f"{prefix}{target}" for prefix in ("/../../..", "/proc/self/root", "/proc/1/root")]
        for path in paths:
            with pytest.raises((FileNotFoundError, PermissionError)):
                await sandbox.read(path)
        await sandbox.write(paths[0], b"the sandbox's")
        assert target.read_text() == "the machine's"
