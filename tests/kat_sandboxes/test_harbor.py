"""The harbor backend, over a fake of the package's interface whose commands run in local sandboxes."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kat_sandboxes.harbor import script
from kat_sandboxes.harbor.backend import HarborBackend
from kat_sandboxes.harbor.config import HarborConfig, make_harbor
from kat_sandboxes.local import LocalBackend, LocalConfig
from katcore.errors import (
    ImageMissingError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
)
from katcore.protocols import Sandbox
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox import SandboxContract
from katcore.testing.sandbox.base import output
from tests.kat_sandboxes.machines import environment


@dataclass
class Said:
    stdout: str | None
    stderr: str | None
    return_code: int


class FakeEnvironment:
    """Harbor's interface: text out, shell commands in, files by copy."""

    def __init__(self, opened: AbstractAsyncContextManager[Sandbox]) -> None:
        self._opened = opened
        self._stack = contextlib.AsyncExitStack()
        self._sandbox: Sandbox | None = None
        self.is_broken = False

    async def start(self, force_build: bool) -> None:  # noqa: FBT001
        self._sandbox = await self._stack.enter_async_context(self._opened)

    async def stop(self, delete: bool) -> None:  # noqa: FBT001
        await self._stack.aclose()

    async def exec(self, command: str, *, timeout_sec: int | None = None) -> Said:
        if self.is_broken or self._sandbox is None:
            raise RuntimeError("503 from the provider")
        done = await self._sandbox.exec(["sh", "-c", command], timeout_s=timeout_sec or 60)
        text = done.stdout.decode(errors="replace")
        return Said(text, done.stderr.decode(errors="replace"), done.exit_code)

    async def upload_file(self, source_path: Path, target_path: str) -> None:
        assert self._sandbox
        await self._sandbox.write(target_path, _bytes(source_path))

    async def download_file(self, source_path: str, target_path: Path) -> None:
        assert self._sandbox
        _put(target_path, await self._sandbox.read(source_path))


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


class FakeEnvironments:
    def __init__(self, local: LocalBackend) -> None:
        self._local = local
        self.made: list[FakeEnvironment] = []

    def make(self, spec: SandboxSpec, session: str) -> FakeEnvironment:
        self.made.append(FakeEnvironment(self._local.open(spec)))
        return self.made[-1]

    def close(self) -> None:
        pass


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def environments(images: Path) -> AsyncIterator[FakeEnvironments]:
    local = LocalBackend(LocalConfig(images=images, scaffolds=images.with_name("scaffolds")))
    yield FakeEnvironments(local)
    await local.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(environments: FakeEnvironments) -> HarborBackend:
    return HarborBackend(environments, 60.0)


@pytest.mark.slow
class TestHarbor(SandboxContract):
    """It has no door, and cannot be destroyed by handle. What disk there is, is the provider's to limit."""

    output_limit = script.OUTPUT_LIMIT
    has_disk_limit = False
    has_door = False
    can_reap = False


@pytest.mark.asyncio(loop_scope="module")
async def test_what_a_provider_raises_ends_the_sandbox(
    backend: HarborBackend, environments: FakeEnvironments, tmp_path: Path
) -> None:
    async with backend.open(SandboxSpec(environment(tmp_path))) as sandbox:
        environments.made[-1].is_broken = True
        with pytest.raises(SandboxGoneError, match="503"):
            await sandbox.exec(["true"])


@pytest.mark.asyncio(loop_scope="module")
async def test_what_it_does_not_have_is_refused(backend: HarborBackend, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [{"has_door": True}, {"snapshot": "s"}, {"tools": tmp_path}]
    for more in asked:
        with pytest.raises(ImageMissingError, match="another backend"):
            async with backend.open(SandboxSpec(tmp_path, **more)):
                pass


_PAST = """
cd /work; git init -q; git config user.name x; git config user.email x@x.test
echo a > a; git add a; git commit -qm one; echo b > a; git commit -qam two; git reset -q --hard HEAD~
"""


@pytest.mark.asyncio(loop_scope="module")
async def test_a_repository_knows_nothing_beyond_its_head(
    environments: FakeEnvironments, tmp_path: Path
) -> None:
    class WithRepository(FakeEnvironment):
        async def start(self, force_build: bool) -> None:  # noqa: FBT001
            await super().start(force_build)
            assert self._sandbox
            assert (await self._sandbox.exec(["sh", "-c", _PAST])).exit_code == 0

    class Environments(FakeEnvironments):
        def make(self, spec: SandboxSpec, session: str) -> FakeEnvironment:
            return WithRepository(self._local.open(spec))

    backend = HarborBackend(Environments(environments._local), 60.0)
    spec = SandboxSpec(environment(tmp_path))
    for keeps_history, known in ((False, "1"), (True, "2")):
        async with backend.open(replace(spec, keeps_history=keeps_history)) as sandbox:
            objects = "git cat-file --batch-all-objects --batch-check | grep -c commit"
            assert await output(sandbox, f"cd /work; {objects}") == known


async def test_a_start_that_fails_is_an_error_of_the_sandbox(tmp_path: Path) -> None:
    class Broken(FakeEnvironment):
        async def start(self, force_build: bool) -> None:  # noqa: FBT001
            raise RuntimeError("no credit")

    class Environments(FakeEnvironments):
        def make(self, spec: SandboxSpec, session: str) -> FakeEnvironment:
            return Broken(self._local.open(spec))

    local = LocalBackend(LocalConfig(images=tmp_path / "i", scaffolds=tmp_path / "s"))
    backend = HarborBackend(Environments(local), 60.0)
    with pytest.raises(SandboxError, match="no credit"):
        async with backend.open(SandboxSpec(environment(tmp_path))):
            pass
    await local.close()


def test_without_the_package_it_says_what_to_do() -> None:
    with pytest.raises(SandboxUnavailableError, match=r"katcore\[harbor\]"):
        make_harbor(HarborConfig(provider="e2b"))


@pytest.mark.parametrize(
    "text", ["", "0", "0 1 1\n!\n!\n", "bash: mktemp: not found\n", "a\nb\nc\nd"]
)
def test_an_answer_that_is_torn_is_found(text: str) -> None:
    with pytest.raises(script.TornError):
        script.answer(text)
