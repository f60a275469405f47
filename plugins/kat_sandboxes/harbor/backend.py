"""The `harbor` backend: an environment of Harbor's per sandbox, by commands and files that are copied.

There is no agent of ours inside, and no door: only a provider's own interface leads in.
"""

import asyncio
import contextlib
import errno
import io
import os
import secrets
import shlex
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from kat_sandboxes.harbor import script
from kat_sandboxes.harbor.provider import Environment, Environments
from kat_sandboxes.zygote.files import DELETED
from katcore.errors import (
    ImageMissingError,
    KatError,
    OutOfDiskError,
    SandboxError,
    SandboxGoneError,
    SandboxTimeoutError,
    StartTimeoutError,
    TaskError,
)
from katcore.protocols import Sandbox
from katcore.sandbox import history
from katcore.schema.rollout import ExecResult
from katcore.schema.task import SandboxSpec

_SPARE_S, _CUT_S = 30, 600.0
_KILLED = {124, 137}
"""What `timeout` says of a command that it ended."""
_REMOVE = (
    "xargs -0r rm -rf -- < {listed}; tar -xpf {archive} -C / --same-owner; rm -f {listed} {archive}"
)
_ODD = "if [ -e {0} ] && [ ! -f {0} ] && [ ! -d {0} ]; then exit 22; fi; "
_READ = _ODD + "LC_ALL=C cat {0} > /dev/null"
_WRITE = (
    "trap 'rm -f {2}' EXIT; export LC_ALL=C; "
    + _ODD
    + "if [ -d {0} ]; then exit 21; fi; mkdir -p {1} && cat {2} > {0}"
)
_SAID = {
    b"Too many levels": errno.ELOOP,
    b"Not a directory": errno.ENOTDIR,
    b"File exists": errno.ENOTDIR,
    b"Directory nonexistent": errno.ENOTDIR,
    b"Is a directory": errno.EISDIR,
    b"Permission denied": errno.EACCES,
    b"No space left": errno.ENOSPC,
    b"File too large": errno.EFBIG,
    b"No such file": errno.ENOENT,
}
"""What programs say of the errors that they met."""


def _error(result: ExecResult, path: str) -> OSError:
    codes = (code for said, code in _SAID.items() if said in result.stderr)
    code = next(codes, result.exit_code)
    if code in (errno.ENOSPC, errno.EFBIG):
        return OutOfDiskError(f"{path}: {os.strerror(code)}")
    said = "not a regular file" if code == errno.EINVAL else os.strerror(code)
    return OSError(code, said, path)


class HarborSandbox:
    """One environment that was started."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._before: dict[str, str] = {}
        self._lock = asyncio.Lock()
        self._is_open = True

    async def begin(self, *, keeps_history: bool) -> None:
        """Cut what git repositories know beyond their HEAD, and remember what there is."""
        self._before, locked = await self._list()
        await self._relock(locked)
        found = script.repositories(self._before)
        if not found or keeps_history:
            return
        result = await self.exec(["bash", "-c", history.SCRIPT], timeout_s=_CUT_S)
        if result.exit_code:
            said = result.stderr.decode(errors="replace")[-300:]
            raise TaskError(
                f"/{found[0]}: what this git repository knows beyond its HEAD cannot be taken out (exit"
                f" code {result.exit_code}: {said}). It takes bash and git in the image; or the task has to"
                " say keep_git_history"
            )
        self._before, locked = await self._list()
        await self._relock(locked)

    def end(self) -> None:
        """It is of no use any more."""
        self._is_open = False

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> ExecResult:
        """See `Sandbox.exec`. Output beyond 256 KiB per stream is dropped, and the result says so."""
        began_s = time.monotonic()
        command = script.execute(argv, cwd, env or {}, timeout_s)
        result = await self._run(command, timeout_s)
        if result.exit_code in _KILLED and time.monotonic() - began_s >= timeout_s:
            raise SandboxTimeoutError(f"{argv[0]}: ran past its {timeout_s:g} s; all is killed")
        return result

    async def read(self, path: str) -> bytes:
        """See `Sandbox.read`."""
        found = await self._sh(_READ.format(shlex.quote(path)))
        if found.exit_code:
            raise _error(found, path)
        return await self._download(path)

    async def write(self, path: str, data: bytes) -> None:
        """See `Sandbox.write`."""
        upload = f"{script.FOLDER}/{secrets.token_hex(8)}"
        target, folder = shlex.quote(path), shlex.quote(os.path.dirname(path) or "/")
        command = _WRITE.format(target, folder, upload)
        if "\0" in command:
            raise ValueError("embedded null byte")
        await self._upload(upload, data)
        result = await self._sh(command)
        if result.exit_code:
            raise _error(result, path)

    async def changes(self) -> bytes:
        """See `SupportsChanges`: a tar archive; deleted paths carry a pax header."""
        now, locked = await self._list()
        try:
            changed = [name for name, said in now.items() if self._before.get(name) != said]
            listed, archive = f"{script.FOLDER}/listed", f"{script.FOLDER}/changes.tar"
            await self._upload(
                listed, b"".join(os.fsencode(name) + b"\0" for name in sorted(changed))
            )
            await self._checked(
                "tar -c --format=pax --null --no-recursion --verbatim-files-from -C /"
                f" -f {archive} -T {listed}"
            )
            data = await self._download(archive)
        finally:
            await self._relock(locked)
        missing = {name for name in self._before if name not in now}
        gone = [name for name in sorted(missing) if os.path.dirname(name) not in missing]
        return _archive(data, locked, gone)

    async def apply(self, changes: bytes) -> None:
        """See `SupportsChanges`."""
        gone: list[str] = []
        buffer = io.BytesIO()
        with (
            tarfile.open(fileobj=io.BytesIO(changes)) as old,
            tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as new,
        ):
            for member in old:
                if DELETED in member.pax_headers or not member.isdir():
                    gone.append(member.name)
                if DELETED not in member.pax_headers:
                    new.addfile(member, old.extractfile(member) if member.isreg() else None)
        listed, archive = f"{script.FOLDER}/listed", f"{script.FOLDER}/changes.tar"
        await self._upload(listed, b"".join(b"/" + os.fsencode(name) + b"\0" for name in gone))
        await self._upload(archive, buffer.getvalue())
        await self._checked(_REMOVE.format(listed=listed, archive=archive))

    async def _list(self) -> tuple[dict[str, str], dict[str, int]]:
        """All files, and the modes of those that were locked and are open now: see `_relock`."""
        listed, locked = f"{script.FOLDER}/files", f"{script.FOLDER}/locked"
        await self._checked(f"mkdir -p {script.FOLDER}; {script.listing(locked)} > {listed}")
        modes = script.modes(await self._download(locked))
        return script.signatures(await self._download(listed)), modes

    async def _relock(self, modes: dict[str, int]) -> None:
        if modes:
            path = f"{script.FOLDER}/relock"
            await self._upload(path, script.relock(modes))
            await self._checked(f"sh {path}")

    async def _sh(self, command: str) -> ExecResult:
        return await self._run(script.execute(["sh", "-c", command], None, {}, 120.0), 120.0)

    async def _checked(self, command: str) -> None:
        result = await self._sh(command)
        if result.exit_code:
            said = result.stderr.decode(errors="replace")[-300:]
            raise SandboxError(f"the sandbox cannot say or make changes: {said}")

    async def _run(self, command: str, timeout_s: float) -> ExecResult:
        async with self._using("exec"):
            found = await self._environment.exec(command, timeout_sec=int(timeout_s) + _SPARE_S)
            return script.answer(found.stdout or "")

    async def _upload(self, path: str, data: bytes) -> None:
        with tempfile.NamedTemporaryFile(prefix="katcore-harbor-") as file:
            file.write(data)
            file.flush()
            async with self._using("upload"):
                await self._environment.upload_file(Path(file.name), path)

    async def _download(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="katcore-harbor-") as folder:
            target = Path(folder) / "file"
            async with self._using("download"):
                await self._environment.download_file(path, target)
            return target.read_bytes()

    @asynccontextmanager
    async def _using(self, do: str) -> AsyncIterator[None]:
        """One use at a time. Whatever a provider raises, the sandbox is gone for us."""
        async with self._lock:
            if not self._is_open:
                raise SandboxGoneError("the sandbox is not open")
            try:
                yield
            except KatError:
                raise
            except Exception as error:
                raise SandboxGoneError(f"the sandbox failed during {do}: {error!r}") from error


def _archive(data: bytes, modes: dict[str, int], gone: Sequence[str]) -> bytes:
    """An archive with these modes, in which some paths are deleted."""
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as old,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in old:
            member.mode = modes.get(member.name, member.mode)
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
        for name in gone:
            entry = tarfile.TarInfo(name)
            entry.pax_headers = {DELETED: "1"}
            new.addfile(entry)
    return buffer.getvalue()


class HarborBackend:
    """Opens environments of one provider."""

    def __init__(self, environments: Environments, start_s: float) -> None:
        self._environments = environments
        self._start_s = start_s

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """See `SandboxBackend.open`."""
        return self._open(spec)

    async def close(self) -> None:
        """See `SandboxBackend.close`."""
        self._environments.close()

    @asynccontextmanager
    async def _open(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        for asked, what in (
            (spec.snapshot, "snapshots"),
            (spec.has_door, "doors"),
            (spec.tools, "tools"),
        ):
            if asked:
                raise ImageMissingError(f"sandboxes of harbor have no {what}: use another backend")
        environment = self._environments.make(spec, f"katcore-{secrets.token_hex(8)}")
        try:
            await self._start(environment)
            sandbox = HarborSandbox(environment)
            await sandbox.begin(keeps_history=spec.keeps_history)
            try:
                yield sandbox
            finally:
                sandbox.end()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._start_s):
                    await environment.stop(delete=True)

    async def _start(self, environment: Environment) -> None:
        try:
            async with asyncio.timeout(self._start_s):
                await environment.start(force_build=False)
        except TimeoutError as error:
            raise StartTimeoutError(
                f"the sandbox was not ready within {self._start_s:g} s"
            ) from error
        except KatError:
            raise
        except Exception as error:
            raise SandboxError(f"the sandbox could not be started: {error!r}") from error
