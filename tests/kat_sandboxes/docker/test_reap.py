"""kill -9 of who holds containers, and of the engine: a reap leaves none of ours, and all of others'."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kat_sandboxes.docker.backend import DockerBackend
from kat_sandboxes.docker.config import DockerConfig
from katcore.errors import EvictedError, SandboxElsewhereError, SandboxUnavailableError
from katcore.plugin import Plugins
from katcore.protocols import Sandbox, SandboxBackend, SupportsHandle
from katcore.sandbox import reaper
from katcore.sandbox.lease import open_backend
from katcore.sandbox.ledger import Ledger
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec
from tests.conftest import NOT_RUN
from tests.kat_sandboxes.engine import BASE, Dockerd, NoEngineError, client, prepared
from tests.kat_sandboxes.machines import environment, output, processes_with, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.slow]

_HOLDER = """
import asyncio, json, sys
from pathlib import Path
from katcore.plugin import Plugins
from katcore.sandbox.lease import open_backend
from katcore.schema.task import SandboxSpec

folder, url, word, dies_at = sys.argv[1:]

def die(*_):
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with open_backend(Plugins.installed(), "docker", {"url": url}) as backend:
        if dies_at == "created":
            backend._backend._backend._engine.start = die
        async with backend.open(SandboxSpec(Path(folder))) as sandbox:
            await sandbox.exec(["sh", "-c", f"setsid sleep {word} >/dev/null 2>&1 &"])
            print(sandbox.handle(), flush=True)
            await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def own() -> Iterator[Dockerd]:
    """An engine that may be killed."""
    made: Dockerd | None = None
    try:
        made = Dockerd()
        made.start()
        with prepared(made.url):
            yield made
    except NoEngineError as error:
        pytest.skip(f"{NOT_RUN}: {error}")
    finally:
        if made:
            made.close()


class Scene:
    """A home with a ledger, an engine, and processes that hold containers of it."""

    def __init__(self, home: Path, engine: Dockerd) -> None:
        self.engine = engine
        self.folder = environment(home / "environment", f"FROM {BASE}\nWORKDIR /work\n")
        self.plugins = Plugins.installed()
        self.ledger = Ledger()
        self.started: list[subprocess.Popen[str]] = []

    def hold(self, word: str, dies_at: str = "") -> "subprocess.Popen[str]":
        arguments = [str(self.folder), self.engine.url, word, dies_at]
        self.started.append(
            subprocess.Popen(
                [sys.executable, "-c", _HOLDER, *arguments], stdout=subprocess.PIPE, text=True
            )
        )
        return self.started[-1]

    def open(self) -> Any:
        return open_backend(self.plugins, "docker", {"url": self.engine.url}, work="beside")

    async def reap(self) -> reaper.Reaped:
        return await reaper.reap(self.ledger, self.plugins)

    def marks(self) -> set[str]:
        return {holder.mark for holder in self.ledger.read()[0]}

    def containers(self, mark: str = "") -> list[str]:
        labels = [f"katcore.mark={mark}"] if mark else []
        found = client(self.engine.url).containers(all=True, filters={"label": labels})
        return [item["Names"][0].strip("/") for item in found]


@pytest.fixture
def scene(own: Dockerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    made = Scene(tmp_path, own)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
    made.ledger.close()


@pytest.fixture
def foreign(own: Dockerd) -> Iterator[str]:
    """A container that is not ours."""
    api = client(own.url)
    body = {"Image": BASE, "Cmd": ["sleep", "81101"], "NetworkDisabled": True}
    api.create_container_from_config(body, "foreign")
    api.start("foreign")
    yield "foreign"
    api.remove_container("foreign", force=True)


async def opened(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return (await asyncio.to_thread(process.stdout.readline)).strip()


def handle(sandbox: Sandbox) -> str:
    assert isinstance(sandbox, SupportsHandle)
    return sandbox.handle()


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()


async def test_of_a_killed_process_nothing_is_left_and_others_are_untouched(
    scene: Scene, foreign: str
) -> None:
    async with scene.open() as backend, backend.open(SandboxSpec(scene.folder)) as sandbox:
        await output(sandbox, "echo 1 > mine")
        (beside,) = scene.marks()
        process = scene.hold("81102")
        assert await opened(process)
        (mark,) = scene.marks() - {beside}
        assert processes_with("81102")
        end(process)
        reaped = await scene.reap()
        assert (reaped.holders, reaped.left) == (1, ())
        assert scene.containers(mark) == []
        assert processes_with("81102") == []
        assert not list((scene.folder.parent / "docker").glob(f"*{mark}*"))
        assert scene.marks() == {beside}
        assert sorted(scene.containers()) == sorted([foreign, handle(sandbox)])
        assert await output(sandbox, "cat mine") == "1"
    assert scene.containers() == [foreign]
    assert scene.ledger.read()[:2] == ([], [])


async def test_a_container_that_was_never_started_is_found(scene: Scene) -> None:
    process = scene.hold("x", dies_at="created")
    assert await asyncio.to_thread(process.wait) == -signal.SIGKILL
    (mark,) = scene.marks()
    assert scene.containers(mark)
    assert (await scene.reap()).holders == 1
    assert scene.containers(mark) == []


async def test_without_its_process_a_container_ends_by_itself(scene: Scene) -> None:
    process = scene.hold("81103")
    name = await opened(process)
    end(process)
    await wait_until(lambda: not processes_with("81103"), seconds=30)
    await wait_until(lambda: name not in scene.containers(), seconds=30)
    await scene.reap()


async def test_the_engine_is_killed_and_comes_back(scene: Scene, foreign: str) -> None:
    spec = SandboxSpec(scene.folder)
    process = scene.hold("81104")
    assert await opened(process)
    async with scene.open() as backend:
        with pytest.raises(SandboxUnavailableError, match="no container engine answers"):
            await lose_the_engine(scene, backend, process)
        await wait_until(lambda: "left" in {lease.state for lease in scene.ledger.read()[1]})
        assert len(scene.ledger.read()[1]) == 2, "what could not be destroyed is still on record"
        scene.engine.start()
        reaped = await scene.reap()
        assert reaped == reaper.Reaped(1, 2)
        assert scene.containers() == [foreign]
        assert processes_with("81104") == []
        assert len(processes_with("81101")) >= 1
        async with backend.open(spec) as sandbox:
            assert await output(sandbox, "echo on") == "on"
    assert scene.ledger.read()[1] == []


async def lose_the_engine(
    scene: Scene, backend: SandboxBackend, process: "subprocess.Popen[str]"
) -> None:
    """What is open goes on, what is new fails, and what is dead waits. Raises when it cannot be destroyed."""
    spec = SandboxSpec(scene.folder)
    async with backend.open(spec) as sandbox:
        await output(sandbox, "setsid sleep 81104 >/dev/null 2>&1 &")
        scene.engine.kill()
        assert await output(sandbox, "echo on") == "on"
        with pytest.raises(SandboxUnavailableError, match="no container engine answers"):
            async with backend.open(spec):
                pass
        end(process)
        assert "no container engine answers" in (await scene.reap()).left[0]


async def test_one_that_is_killed_by_its_id_is_gone_for_its_user(scene: Scene) -> None:
    async with scene.open() as backend, backend.open(SandboxSpec(scene.folder)) as sandbox:
        await wait_until(lambda: all(lease.handle for lease in scene.ledger.read()[1]))
        (lease,) = scene.ledger.read()[1]
        assert await reaper.kill(scene.ledger, scene.plugins, [lease.id]) == 1
        with pytest.raises(EvictedError):
            await sandbox.exec(["true"])


async def test_what_another_engine_has_is_not_taken_for_gone(scene: Scene) -> None:
    backend = DockerBackend(DockerConfig(url=scene.engine.url))
    mark = "katcore-docker-000000-000000000000"
    with pytest.raises(SandboxElsewhereError, match="another engine"):
        await backend.sweep(Holder("h", "docker", "{}", mark, "another", "boot.1:1:1"))
    with pytest.raises(SandboxElsewhereError, match="another engine"):
        await backend.destroy(Lease("l", "h", handle=f"{mark}-1"))
    await backend.close()
