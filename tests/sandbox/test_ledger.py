"""Where leases are kept: a file that is taken away, and a URL that is none."""

import asyncio
import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from katcore.errors import ConfigError, LedgerError
from katcore.sandbox import lease as leases
from katcore.sandbox.lease import open_backend
from katcore.sandbox.ledger import Ledger
from tests.sandbox.leases import SPEC, holder, leased, machines, plugins, states
from tests.sandbox.postgres import START_S, Postgres


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KATCORE_LEDGER", raising=False)


async def test_a_driver_that_is_not_installed_is_said_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATCORE_LEDGER", "nosuch://user:hush@host/database")
    with pytest.raises(ConfigError, match="needs a database driver that is not here") as error:
        async with open_backend(plugins(), "files", {"folder": str(folder)}):
            pass
    assert "hush" not in str(error.value)


async def test_no_machine_is_made_that_cannot_be_put_on_record(
    ledger: Ledger, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(leases, "_RETRY_S", 0.05)
    path = tmp_path / "home" / "leases.db"
    path.parent.mkdir()
    path.write_bytes(b"no ledger, but a diary" * 100)
    async with leased(ledger, folder) as (_, wrapped):
        with pytest.raises(LedgerError, match="not a database; move the file away"):
            async with wrapped.open(SPEC):
                pytest.fail("it was opened")
        assert machines(folder) == []
        path.unlink()
        async with wrapped.open(SPEC):
            assert len(states(ledger)) == 1


@pytest.mark.parametrize("how", ["deleted", "moved"])
async def test_a_ledger_that_is_taken_away_is_written_again(
    ledger: Ledger, folder: Path, tmp_path: Path, how: str
) -> None:
    async with leased(ledger, folder) as (_, wrapped), wrapped.open(SPEC):
        for path in (tmp_path / "home").glob("leases.db*"):
            path.unlink() if how == "deleted" else path.rename(tmp_path / path.name)
        assert ledger.read()[:2] == ([], [])
        async with wrapped.open(replace(SPEC, serves="next")):
            assert len(ledger.read()[0]) == 1
            assert sorted(item.serves for item in ledger.read()[1]) == ["", "next"]


async def test_a_server_that_is_killed_is_written_to_when_it_is_back(
    postgres: Postgres, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_PATIENCE_S", START_S)
    ledger = Ledger(make_url(postgres.database()))
    async with leased(ledger, folder) as (_, wrapped), wrapped.open(replace(SPEC, serves="first")):
        await asyncio.to_thread(postgres.kill)
        back = asyncio.create_task(asyncio.to_thread(postgres.start))
        async with wrapped.open(replace(SPEC, serves="next")):
            assert sorted(item.serves for item in ledger.read()[1]) == ["first", "next"]
        await back
    assert ledger.read()[:2] == ([], [])
    ledger.close()


def test_sqlite_is_set_up_for_many_writers(tmp_path: Path) -> None:
    Ledger().save(holder(), None, {})
    with contextlib.closing(sqlite3.connect(tmp_path / "home" / "leases.db")) as found:
        assert found.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "postgresql://u:hush@h"])
def test_a_url_that_is_none_is_refused_without_being_shown(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KATCORE_LEDGER", url)
    with pytest.raises(ConfigError, match="KATCORE_LEDGER is no URL") as error:
        Ledger()
    assert "hush" not in str(error.value)


def test_a_password_is_never_said() -> None:
    found = Ledger(make_url("postgresql+psycopg2://u:hush@127.0.0.1:1/katcore"))
    assert found.name == "postgresql+psycopg2://u:***@127.0.0.1:1/katcore"
    with pytest.raises((LedgerError, ConfigError)) as error:
        found.read()
    assert "hush" not in str(error.value)
