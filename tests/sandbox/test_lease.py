"""Leases: on record before the machine is there, struck out after it is gone; reaped when nobody is left."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from katcore.errors import ConfigError, LedgerError, SandboxError
from katcore.sandbox import lease as leases
from katcore.sandbox import reaper
from katcore.sandbox.lease import open_backend
from katcore.sandbox.ledger import Ledger
from katcore.sandbox.reaper import Reaped
from katcore.schema.lease import Lease
from tests.sandbox.leases import (
    SPEC,
    FileBackend,
    dead,
    holder,
    leased,
    machines,
    plugins,
    states,
    until,
)


@pytest.fixture(autouse=True, params=["sqlite", "postgresql"])
def _own_home(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KATCORE_LEDGER", raising=False)
    if request.param == "postgresql":
        monkeypatch.setenv("KATCORE_LEDGER", request.getfixturevalue("postgres").database())


async def test_it_is_on_record_before_it_is_made_and_until_it_is_gone(
    ledger: Ledger, folder: Path
) -> None:
    seen: list[list[str]] = []
    async with leased(ledger, folder) as (backend, wrapped):
        backend.observe = lambda: seen.append(states(ledger))
        async with wrapped.open(replace(SPEC, serves="r1")):
            assert seen == [["creating"]]
            await until(lambda: states(ledger) == ["running"])
            (found,) = ledger.read()[1]
            assert (found.serves, found.handle) == ("r1", "mark-0")
        await until(lambda: states(ledger) == [])
    assert ledger.read()[:2] == ([], [])


async def test_one_that_cannot_be_opened_leaves_no_lease(ledger: Ledger, folder: Path) -> None:
    async with leased(ledger, folder) as (backend, wrapped):
        backend.fails["open"] = SandboxError("no room")
        with pytest.raises(SandboxError, match="no room"):
            async with wrapped.open(SPEC):
                pass
        await until(lambda: states(ledger) == [])


async def test_an_error_of_its_user_is_no_reason_to_keep_the_lease(
    ledger: Ledger, folder: Path
) -> None:
    async with leased(ledger, folder) as (_, wrapped):
        with pytest.raises(ZeroDivisionError):
            async with wrapped.open(SPEC):
                raise ZeroDivisionError
        await until(lambda: states(ledger) == [])


async def test_one_that_could_not_be_destroyed_is_destroyed_by_the_reaper(
    ledger: Ledger, folder: Path
) -> None:
    async with leased(ledger, folder) as (backend, wrapped):
        backend.fails["exit"] = SandboxError("the daemon is away")
        with pytest.raises(SandboxError, match="daemon"):
            async with wrapped.open(SPEC):
                pass
        await until(lambda: states(ledger) == ["left"])
        assert machines(folder)
        assert await reaper.reap(ledger, plugins()) == Reaped(0, 1)
        assert machines(folder) == []
        assert states(ledger) == []


async def test_one_that_could_not_be_destroyed_outlives_the_holder_on_record(
    ledger: Ledger, folder: Path
) -> None:
    async with leased(ledger, folder) as (backend, wrapped):
        backend.fails["exit"] = SandboxError("the daemon is away")
        with pytest.raises(SandboxError, match="daemon"):
            async with wrapped.open(SPEC):
                pass
    assert states(ledger) == ["left"]
    assert await reaper.reap(ledger, plugins()) == Reaped(0, 1)
    assert machines(folder) == []


async def test_an_error_that_nobody_thought_of_is_heard_of(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_PATIENCE_S", 0.0)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async with leased(ledger, folder) as (_, wrapped):
        monkeypatch.setattr(Ledger, "save", fail)
        with pytest.raises(LedgerError, match="ZeroDivisionError"):
            async with wrapped.open(SPEC):
                pytest.fail("it was opened")


async def test_many_at_once_are_few_transactions(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    save = Ledger.save

    def counted(self: Ledger, *arguments: object) -> None:
        written.append(1)
        save(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "save", counted)
    async with leased(ledger, folder) as (_, wrapped):

        async def one() -> None:
            async with wrapped.open(SPEC):
                await asyncio.sleep(0.1)

        await asyncio.gather(*(one() for _ in range(200)))
        assert len(written) < 40


async def test_a_cancelled_opening_leaves_no_lease(ledger: Ledger, folder: Path) -> None:
    async with leased(ledger, folder) as (backend, wrapped):

        async def one() -> None:
            async with wrapped.open(SPEC):
                await asyncio.sleep(60)

        running = [asyncio.create_task(one()) for _ in range(20)]
        for number, task in enumerate(running):
            await asyncio.sleep(0.001 * (number % 3))
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await until(lambda: states(ledger) == [])
        assert machines(folder) == []
        assert backend.closed == 0


async def test_what_a_dead_process_left_is_reclaimed_when_the_next_opens(folder: Path) -> None:
    first = Ledger()
    first.save(holder(process=dead(), folder=str(folder)), None, {"l": Lease("l", "h")})
    first.close()
    (folder / "mark-0").touch()
    (folder / "other-0").touch()
    made: list[FileBackend] = []
    options = {"folder": str(folder), "mark": "own"}
    async with open_backend(plugins(made), "files", options) as backend:
        assert machines(folder) == ["other-0"]
        async with backend.open(SPEC):
            pass
    assert [item.closed for item in made] == [1, 1]
    assert Ledger().read()[:2] == ([], [])


async def test_a_holder_elsewhere_is_dead_when_it_was_silent_for_long(ledger: Ledger) -> None:
    ledger.save(holder(process="another:1:1"), None, {})
    (found,), _, now_s = ledger.read()
    assert not reaper.is_dead(found, now_s)
    assert not reaper.is_dead(found, now_s + reaper.SILENT_S - 1)
    assert reaper.is_dead(found, now_s + reaper.SILENT_S + 1)


async def test_what_is_elsewhere_or_stuck_stays_on_record_and_is_said(
    ledger: Ledger, folder: Path
) -> None:
    ledger.save(holder("a", process=dead(), folder=str(folder), host="elsewhere"), None, {})
    ledger.save(holder("b", process=dead(), folder=str(folder)), None, {"l": Lease("l", "b")})
    (folder / "stuck").touch()
    reaped = await reaper.reap(ledger, plugins())
    assert (reaped.holders, reaped.leases) == (0, 0)
    assert [text.partition(": ")[2] for text in reaped.left] == ["it is elsewhere", "it is stuck"]
    assert len(ledger.read()[0]) == 2
    (folder / "stuck").unlink()
    assert (await reaper.reap(ledger, plugins())).leases == 1


async def test_what_nobody_reclaims_for_a_day_is_struck_out(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.save(holder(process="another:1:1", folder=str(folder), host="elsewhere"), None, {})
    monkeypatch.setattr(reaper, "SILENT_S", -1.0)
    assert (await reaper.reap(ledger, plugins())).left
    monkeypatch.setattr(reaper, "_GIVEN_UP_S", -1.0)
    assert (await reaper.reap(ledger, plugins())).holders == 1


async def test_a_run_s_reap_leaves_other_runs_alone(ledger: Ledger, folder: Path) -> None:
    for name, run in (("a", "monday"), ("b", "tuesday")):
        found = holder(name, process=dead(), folder=str(folder), mark=name, run=run)
        ledger.save(found, None, {})
    assert (await reaper.reap(ledger, plugins(), run="monday")).holders == 1
    assert [item.run for item in ledger.read()[0]] == ["tuesday"]


async def test_a_holder_that_spoke_up_meanwhile_is_not_struck_out(ledger: Ledger) -> None:
    ledger.save(holder(), None, {"l": Lease("l", "h")})
    (read,), _, _ = ledger.read()
    ledger.save(holder(), {"l": Lease("l", "h")}, {})
    assert ledger.retire(read) is None
    (again,), _, _ = ledger.read()
    assert ledger.retire(again) == 0


async def test_an_unknown_backend_is_said(ledger: Ledger) -> None:
    ledger.save(holder(process=dead(), backend="uninstalled"), None, {})
    (line,) = (await reaper.reap(ledger, plugins())).left
    assert "no sandbox named 'uninstalled'" in line


async def test_killing_needs_one_that_is_meant(ledger: Ledger, folder: Path) -> None:
    (folder / "m").touch()
    known = {name: Lease(name, "h", state="running", handle="m") for name in ("aa1", "aa2")}
    known["c"] = Lease("c", "h")
    ledger.save(holder(folder=str(folder)), None, known)
    for beginning, said in (("aa", "2 sandboxes have"), ("x", "no sandbox has")):
        with pytest.raises(ConfigError, match=said):
            await reaper.kill(ledger, plugins(), ["aa1", beginning])
    assert (folder / "m").exists()
    with pytest.raises(SandboxError, match="is being made"):
        await reaper.kill(ledger, plugins(), ["c"])
    assert await reaper.kill(ledger, plugins(), ["aa1", "aa2"]) == 2
    assert machines(folder) == []
    assert [item.id for item in ledger.read()[1]] == ["c"]


def test_processes_that_make_the_ledger_at_once_do_not_disturb_each_other() -> None:
    failures: list[Exception] = []

    def write(number: int) -> None:
        own = Ledger()
        try:
            for turn in range(5):
                name = f"{number}.{turn}"
                own.save(holder(str(number)), None, {name: Lease(name, str(number))})
        except LedgerError as error:
            failures.append(error)
        own.close()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(item.id for item in Ledger().read()[1]) == [f"{n}.4" for n in range(8)]
