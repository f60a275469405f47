"""kill -9 at any moment: after a reap nothing is left of the dead, and nothing of the living was touched."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from kat_sandboxes import reap as remains
from kat_sandboxes.local import LocalBackend, LocalConfig
from katcore.cli import app
from katcore.errors import SandboxElsewhereError, SandboxGoneError
from katcore.plugin import Plugins
from katcore.protocols import SandboxBackend, SupportsHandle, SupportsReap
from katcore.sandbox import reaper
from katcore.sandbox.lease import open_backend
from katcore.sandbox.ledger import Ledger
from katcore.sandbox.process import Process
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec
from tests.kat_sandboxes.machines import environment, output, processes_with, wait_until

_HOLDER = """
import asyncio, itertools, json, sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from katcore.plugin import Plugins
from katcore.sandbox.lease import open_backend
from katcore.schema.task import SandboxSpec

folder, images, word, num, dies_at = sys.argv[1:]
spec = SandboxSpec(Path(folder))

def die(*_):
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)

async def churn(backend, number):
    for turn in itertools.count():
        async with backend.open(replace(spec, serves=f"r{number}.{turn}")) as sandbox:
            command = f"setsid sleep {word} >/dev/null 2>&1 & echo x > file"
            await sandbox.exec(["bash", "-c", command])
            print(turn, flush=True)
            await asyncio.sleep(0.05)

async def main():
    async with open_backend(Plugins.installed(), "local", {"images": images}) as backend:
        leased = backend._backend
        if dies_at == "before":
            leased._backend.open = die
        if dies_at == "after":
            leased._register.put = die
        async with asyncio.TaskGroup() as group:
            for number in range(int(num)):
                group.create_task(churn(backend, number))

asyncio.run(main())
"""


class Scene:
    """A home with a ledger and images, and processes that hold sandboxes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.images = home / "images"
        self.folder = environment(home / "environment")
        self.plugins = Plugins.installed()
        self.ledger = Ledger()
        self.started: list[subprocess.Popen[str]] = []

    def hold(self, word: str, num: int = 4, dies_at: str = "") -> "subprocess.Popen[str]":
        arguments = [str(self.folder), str(self.images), word, str(num), dies_at]
        self.started.append(
            subprocess.Popen(
                [sys.executable, "-c", _HOLDER, *arguments], stdout=subprocess.PIPE, text=True
            )
        )
        return self.started[-1]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[SandboxBackend]:
        options = {"images": str(self.images)}
        async with open_backend(self.plugins, "local", options, work="beside") as backend:
            yield backend

    async def reap(self) -> reaper.Reaped:
        return await reaper.reap(self.ledger, self.plugins)

    def marks(self) -> set[str]:
        return {holder.mark for holder in self.ledger.read()[0]}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path))
    made = Scene(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()
    for mark in made.marks():
        remains.sweep(mark, made.images)
    made.ledger.close()


def groups(mark: str) -> list[Path]:
    return list(remains._groups(mark))


def left_of(scene: Scene, mark: str) -> list[object]:
    """All that could be left of a backend."""
    found: list[object] = [*remains._marked(mark), *groups(mark), *processes_with(mark)]
    return found + list(scene.images.glob(f"*{mark}*"))


def pid_inside(process: Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (numbers,) = [line.split() for line in lines if line.startswith("NSpid:")]
    return int(numbers[-1])


async def read(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return await asyncio.to_thread(process.stdout.readline)


async def opened_one(process: "subprocess.Popen[str]") -> None:
    assert (await read(process)).strip() == "0"


async def test_killed_again_and_again_nothing_is_left_and_no_other_is_touched(scene: Scene) -> None:
    choose = random.Random(7)
    spec = SandboxSpec(scene.folder)
    async with scene.open() as backend, backend.open(spec) as one, backend.open(spec) as two:
        await output(one, "echo 1 > mine; setsid sleep 81002 >/dev/null 2>&1 &")
        await output(two, "echo 2 > mine")
        beside = scene.marks()
        for _ in range(6):
            process = scene.hold("81001", num=choose.randint(1, 6))
            await opened_one(process)
            await asyncio.sleep(choose.uniform(0, 0.3))
            (mark,) = scene.marks() - beside
            process.kill()
            process.wait()
            reaped = await scene.reap()
            assert (reaped.holders, reaped.left) == (1, ())
            assert left_of(scene, mark) == []
            assert processes_with("81001") == []
            assert scene.marks() == beside
        assert len(processes_with("81002")) == 1
        assert await output(one, "cat mine") == "1"
        assert await output(two, "cat mine") == "2"
        async with backend.open(spec) as three:
            assert await output(three, "echo on") == "on"
    assert scene.ledger.read()[:2] == ([], [])


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_killed_before_or_after_the_creation_it_is_on_record(
    scene: Scene, moment: str
) -> None:
    process = scene.hold("81003", num=1, dies_at=moment)
    assert await asyncio.to_thread(process.wait) == -signal.SIGKILL
    holders, leases, now_s = scene.ledger.read()
    assert [lease.state for lease in leases] == ["creating"]
    assert reaper.is_dead(holders[0], now_s)
    assert await scene.reap() == reaper.Reaped(1, 1)
    assert left_of(scene, holders[0].mark) == []
    assert scene.ledger.read()[:2] == ([], [])


async def test_a_reap_beside_a_living_process_touches_nothing(scene: Scene) -> None:
    process = scene.hold("81004", num=3)
    await opened_one(process)
    for _ in range(5):
        assert await scene.reap() == reaper.Reaped(0, 0)
        await asyncio.sleep(0.05)
    assert process.poll() is None
    await read(process)


async def test_two_reapers_at_once_count_each_dead_process_once(scene: Scene) -> None:
    processes = [scene.hold("81005", num=2) for _ in range(2)]
    for process in processes:
        await opened_one(process)
    marks = scene.marks()
    for process in processes:
        process.kill()
        process.wait()
    both = await asyncio.gather(scene.reap(), scene.reap())
    assert sum(item.holders for item in both) == 2
    assert [item.left for item in both] == [(), ()]
    assert [left_of(scene, mark) for mark in sorted(marks)] == [[], []]


async def test_a_reaper_that_is_killed_is_made_up_for_by_the_next(scene: Scene) -> None:
    process = scene.hold("81006")
    await opened_one(process)
    (mark,) = scene.marks()
    process.kill()
    process.wait()
    choose = random.Random(3)
    for _ in range(3):
        other = subprocess.Popen(  # noqa: ASYNC220 - it is killed, not awaited
            [sys.executable, "-m", "katcore.cli", "sandbox", "reap"],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        await asyncio.sleep(choose.uniform(0.3, 1.2))
        other.kill()
        other.wait()
    await scene.reap()
    assert left_of(scene, mark) == []
    assert scene.marks() == set()


async def test_an_image_that_was_being_built_is_removed(scene: Scene) -> None:
    environment(scene.home / "environment", "FROM host\nRUN echo 81007; sleep 81007\n")
    process = scene.hold("x", num=1)
    await wait_until(lambda: bool(processes_with("81007")), seconds=30)
    (mark,) = scene.marks()
    assert list(scene.images.glob(f"building-{mark}-*"))
    process.kill()
    process.wait()
    assert (await scene.reap()).holders == 1
    assert left_of(scene, mark) == []
    assert processes_with("81007") == []


async def test_when_its_server_is_killed_the_next_sandbox_has_a_new_one(scene: Scene) -> None:
    spec = SandboxSpec(scene.folder)
    async with scene.open() as backend:
        async with backend.open(spec) as sandbox:
            (mark,) = scene.marks()
            marked = remains._marked(mark)
            (server,) = [item for item in marked if psutil.Process(item.pid).ppid() == os.getpid()]
            server.kill()
            with pytest.raises(SandboxGoneError):
                await sandbox.exec(["sleep", "5"])
        async with backend.open(spec) as sandbox:
            assert await output(sandbox, "echo on") == "on"
    assert left_of(scene, mark) == []


async def test_a_sandbox_that_is_killed_by_its_id_is_gone_for_its_user(scene: Scene) -> None:
    spec = SandboxSpec(scene.folder, serves="r1")
    async with scene.open() as backend, backend.open(spec) as other:
        async with backend.open(spec) as sandbox:
            await output(sandbox, "setsid sleep 81008 >/dev/null 2>&1 &")
            await wait_until(lambda: all(lease.handle for lease in scene.ledger.read()[1]))
            lease = scene.ledger.read()[1][-1]
            assert await reaper.kill(scene.ledger, scene.plugins, [lease.id[:10]]) == 1
            assert processes_with("81008") == []
            with pytest.raises(SandboxGoneError):
                await sandbox.exec(["true"])
        assert await output(other, "echo on") == "on"


async def test_without_a_ledger_the_living_are_put_on_record_again(scene: Scene) -> None:
    async with scene.open() as backend, backend.open(SandboxSpec(scene.folder)) as sandbox:
        for path in scene.home.glob("leases.db*"):
            path.rename(path.with_name(f"away-{path.name}"))
        async with backend.open(SandboxSpec(scene.folder, serves="second")):
            leases = scene.ledger.read()[1]
            assert [lease.serves for lease in leases] == ["", "second"]
        assert await output(sandbox, "echo on") == "on"
    assert scene.ledger.read()[:2] == ([], [])


async def test_a_mark_that_nothing_has_is_swept_without_harm(scene: Scene) -> None:
    async with scene.open() as backend, backend.open(SandboxSpec(scene.folder)) as sandbox:
        remains.sweep("katcore-000000000000", scene.images)
        assert await output(sandbox, "echo on") == "on"


async def test_what_is_elsewhere_is_not_taken_for_gone(scene: Scene) -> None:
    backend = LocalBackend(LocalConfig(images=scene.images))
    assert isinstance(backend, SupportsReap)
    process = "another-boot.1:1:1"
    holder = Holder("h", "local", "{}", "katcore-000000000000", "another", process)
    with pytest.raises(SandboxElsewhereError, match="another"):
        await backend.sweep(holder)
    with pytest.raises(SandboxElsewhereError):
        await backend.destroy(Lease("l", "h", handle=process))
    await backend.close()


async def test_a_handle_is_the_first_process_of_its_sandbox(scene: Scene) -> None:
    backend = LocalBackend(LocalConfig(images=scene.images))
    async with backend.open(SandboxSpec(scene.folder, has_door=True)) as sandbox:
        assert isinstance(sandbox, SupportsHandle)
        process = Process.parse(sandbox.handle())
        assert process.is_alive
        assert pid_inside(process) == 1
    assert not process.is_alive
    await backend.close()


async def kat(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, ["sandbox", *arguments])


async def test_the_verbs(scene: Scene) -> None:
    process = scene.hold("81009", num=2)
    await opened_one(process)
    found = json.loads((await kat("list", "--json")).stdout)
    assert {item["holder"] for item in found["sandboxes"]} == {"alive"}
    assert {item["backend"] for item in found["sandboxes"]} == {"local"}
    process.kill()
    process.wait()
    said = await kat("list")
    assert "something may be left of 1" in said.stderr
    done = await kat("reap", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["holders"] == 1
    refused = await kat("kill", "nothing")
    assert refused.exit_code == 2
    assert "no sandbox has an id that begins with 'nothing'" in refused.stderr
    assert (await kat("kill")).exit_code == 2
    assert (await kat("kill", "--all")).exit_code == 0
    assert "no sandbox is open" in (await kat("list")).stderr
