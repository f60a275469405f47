"""The ledger: a row for each sandbox before it is made, and one for the process that holds it.

SQLite in katcore's home, or PostgreSQL by URL. SQLite syncs at checkpoints only, not at each
commit: a killed process loses nothing by it, and a machine that loses its power has lost its sandboxes too.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from katcore.config import home, ledger_url
from katcore.errors import ConfigError, LedgerError
from katcore.schema.lease import Holder, Lease

_BUSY_S = 20
_CREATE_TRIES = 20
_CREATE_RETRY_S = 0.1

T = TypeVar("T")

_META = sa.MetaData()
_HOLDERS = sa.Table(
    "katcore_holders",
    _META,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("backend", sa.Text, nullable=False),
    sa.Column("options", sa.Text, nullable=False),
    sa.Column("mark", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("process", sa.Text, nullable=False),
    sa.Column("run", sa.Text, nullable=False),
    sa.Column("work", sa.Text, nullable=False),
    sa.Column("seen_s", sa.Double, nullable=False),
)
_LEASES = sa.Table(
    "katcore_leases",
    _META,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("holder", sa.String(64), nullable=False),
    sa.Column("serves", sa.Text, nullable=False),
    sa.Column("opened_s", sa.Double, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("handle", sa.Text, nullable=False),
)

_SEEN = (
    sa.update(_HOLDERS)
    .where(_HOLDERS.c.id == sa.bindparam("holder_id"))
    .values(seen_s=sa.bindparam("now_s"))
)
_CHANGED = (
    sa.update(_LEASES)
    .where(_LEASES.c.id == sa.bindparam("lease_id"))
    .values(state=sa.bindparam("new_state"), handle=sa.bindparam("new_handle"))
)
_GONE = sa.delete(_LEASES).where(_LEASES.c.id == sa.bindparam("lease_id"))
_ALL_GONE = sa.delete(_LEASES).where(_LEASES.c.holder == sa.bindparam("holder_id"))
_RETIRED = sa.delete(_HOLDERS).where(
    _HOLDERS.c.id == sa.bindparam("holder_id"), _HOLDERS.c.seen_s <= sa.bindparam("until_s")
)


def default_url() -> URL:
    """Of $KATCORE_LEDGER, or the file in katcore's home.

    Raises:
        ConfigError: it is no URL of a database.
    """
    text = ledger_url()
    if not text:
        return URL.create("sqlite", database=str(home() / "leases.db"))
    try:
        url = make_url(text)
    except ArgumentError:
        url = None
    if url is None or not url.database:
        # The text may hold a password, and is not shown.
        raise ConfigError(
            "KATCORE_LEDGER is no URL of a database; write sqlite:////absolute/path or"
            " postgresql+psycopg2://user:password@host/database"
        )
    return url


class Ledger:
    """The rows. Any thread may use it; each call is one transaction."""

    def __init__(self, url: URL | None = None) -> None:
        self._url = default_url() if url is None else url
        self._path = Path(self._url.database or "") if _is_file(self._url) else None
        self._engine: Engine | None = None
        self._inode = 0
        self._ahead_s = 0.0

    @classmethod
    def at(cls, path: Path) -> "Ledger":
        """In a file of SQLite."""
        return cls(URL.create("sqlite", database=str(path)))

    @property
    def name(self) -> str:
        """Where it is, without its password."""
        return str(self._path) if self._path else self._url.render_as_string(hide_password=True)

    def connect(self) -> None:
        """See that it can be used.

        Raises:
            ConfigError: its driver is not installed.
            LedgerError: it cannot be reached, or is no ledger.
        """
        self._do(lambda _: None)

    def save(
        self, holder: Holder, before: Mapping[str, Lease] | None, after: Mapping[str, Lease]
    ) -> None:
        """Make the holder's leases those of `after`, knowing that they were `before` (None: anything).

        It is the holder's sign of life as well. A holder that is not on record, as one in a ledger that was
        taken away, is put there with all its leases.

        Raises:
            LedgerError: nothing was written.
        """

        def write(connection: Connection) -> None:
            row = {"holder_id": holder.id, "now_s": self._now_s()}
            known = before
            if not connection.execute(_SEEN, row).rowcount:
                connection.execute(sa.insert(_HOLDERS), {**asdict(holder), "seen_s": self._now_s()})
                known = None
            if known is None:
                connection.execute(_ALL_GONE, {"holder_id": holder.id})
                known = {}
            _write_changes(connection, known, after)

        self._do(write)

    def retire(self, holder: Holder) -> int | None:
        """Strike out a holder and its leases; how many there were.

        None: it wrote after `holder` was read, or somebody else struck it out.
        """

        def write(connection: Connection) -> int | None:
            row = {"holder_id": holder.id, "until_s": holder.seen_s or float("inf")}
            if not connection.execute(_RETIRED, row).rowcount:
                return None
            return int(connection.execute(_ALL_GONE, row).rowcount)

        return self._do(write)

    def strike(self, lease_id: str) -> None:
        """Strike out one lease."""
        self._do(lambda connection: connection.execute(_GONE, {"lease_id": lease_id}))

    def read(self) -> tuple[list[Holder], list[Lease], float]:
        """All holders and leases, oldest first, and the ledger's time. Looking makes no file."""
        if self._path and not self._path.exists():
            return [], [], self._now_s()

        def select(connection: Connection) -> tuple[list[Holder], list[Lease], float]:
            holders = connection.execute(sa.select(_HOLDERS).order_by(_HOLDERS.c.seen_s))
            found = [Holder(**row._mapping) for row in holders]
            rows = connection.execute(sa.select(_LEASES).order_by(_LEASES.c.opened_s))
            known = {holder.id for holder in found}
            leases = [Lease(**row._mapping) for row in rows if row.holder in known]
            return found, leases, self._now_s()

        return self._do(select)

    def close(self) -> None:
        """Let go of the database."""
        if self._engine:
            self._engine.dispose()
            self._engine = None

    def _do(self, work: Callable[[Connection], T]) -> T:
        with self._errors_said():
            self._reopen_if_moved()
            engine = self._engine or self._open()
            with engine.begin() as connection:
                return work(connection)

    @contextmanager
    def _errors_said(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            why = error.orig if isinstance(error, DBAPIError) else error
            raise LedgerError(
                f"the ledger of sandboxes, {self.name}: {_advice(str(why))}"
            ) from error

    def _now_s(self) -> float:
        """The database's time, so that the clocks of several machines need not agree."""
        return time.time() + self._ahead_s

    def _reopen_if_moved(self) -> None:
        """A file that was deleted or moved would swallow what is written, and nobody would read it."""
        if self._engine and self._path:
            try:
                inode = os.stat(self._path).st_ino
            except FileNotFoundError:
                inode = -1
            if inode != self._inode:
                self.close()

    def _open(self) -> Engine:
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            engine = sa.create_engine(self._url, pool_pre_ping=self._path is None)
        except (ArgumentError, ImportError) as error:
            raise ConfigError(
                f"the ledger {self.name} needs a database driver that is not here ({error});"
                " for PostgreSQL, install katcore[postgres]"
            ) from error
        if self._path:
            sa.event.listen(engine, "connect", _set_up_sqlite)
        self._create(engine)
        if self._path:
            self._inode = os.stat(self._path).st_ino
        else:
            with engine.connect() as connection:
                seconds = sa.extract("epoch", sa.func.current_timestamp())
                self._ahead_s = float(connection.execute(sa.select(seconds)).scalar_one())
                self._ahead_s -= time.time()
        self._engine = engine
        return engine

    def _create(self, engine: Engine) -> None:
        """Make the tables. Of processes that do it at once some are refused for a moment."""
        for tries_left in reversed(range(_CREATE_TRIES)):
            try:
                with engine.begin() as connection:
                    for table in _META.sorted_tables:
                        connection.execute(CreateTable(table, if_not_exists=True))
                return
            except DBAPIError as error:
                if not tries_left or "not a database" in str(error.orig):
                    engine.dispose()
                    raise
                time.sleep(_CREATE_RETRY_S)


def _write_changes(
    connection: Connection, before: Mapping[str, Lease], after: Mapping[str, Lease]
) -> None:
    gone: list[dict[str, Any]] = [{"lease_id": id_} for id_ in before if id_ not in after]
    new = [asdict(lease) for id_, lease in after.items() if id_ not in before]
    changed: Sequence[dict[str, Any]] = [
        {"lease_id": id_, "new_state": lease.state, "new_handle": lease.handle}
        for id_, lease in after.items()
        if id_ in before and before[id_] is not lease
    ]
    for statement, rows in ((_GONE, gone), (sa.insert(_LEASES), new), (_CHANGED, changed)):
        if rows:
            connection.execute(statement, rows)


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.execute(f"PRAGMA busy_timeout={_BUSY_S * 1000}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _is_file(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _advice(why: str) -> str:
    why = why.strip()
    if "not a database" in why or "malformed" in why:
        return f"{why}; move the file away, and a new one is made"
    if "no column" in why or "no such column" in why or "UndefinedColumn" in why:
        return f"{why}; another version of katcore made it: reap with that one, then remove it"
    if "full" in why:
        return f"{why}; make room"
    return why
