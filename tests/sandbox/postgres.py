"""A PostgreSQL of the tests' own: a folder, reached by a socket in it, that leaves nothing behind."""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError

START_S = 60.0
_NOBODY = 65534


class NoPostgresError(Exception):
    """Why there is none."""


class Postgres:
    """One server. It refuses to run as root, and is nobody's then."""

    def __init__(self) -> None:
        self._programs = _programs()
        self._numbers = itertools.count()
        self.folder = Path(tempfile.mkdtemp(prefix="katcore-pg-"))
        if os.geteuid() == 0:
            os.chown(self.folder, _NOBODY, _NOBODY)
        options = ["--auth=trust", "--username=katcore", "--no-sync", "--encoding=UTF8"]
        self._run("initdb", f"--pgdata={self.folder}/data", *options).wait()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        here = str(self.folder)
        self._process = self._run("postgres", "-D", f"{here}/data", "-k", here, "-h", "")
        until_s = time.monotonic() + START_S
        while True:
            try:
                self._do("SELECT 1")
            except OperationalError:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    said = (self.folder / "log").read_text(errors="replace").splitlines()
                    raise NoPostgresError(
                        f"postgres does not start: {' '.join(said[-2:])}"
                    ) from None
                time.sleep(0.05)
            else:
                return

    def database(self) -> str:
        """The URL of a new one."""
        name = f"ledger{next(self._numbers)}"
        self._do(f"CREATE DATABASE {name}")
        return self._url(name).render_as_string(hide_password=False)

    def kill(self) -> None:
        """kill -9 of all of it."""
        assert self._process
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it, and remove what it made."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
        shutil.rmtree(self.folder)

    def _url(self, database: str) -> URL:
        where = {"host": str(self.folder)}
        return URL.create("postgresql+psycopg2", username="katcore", database=database, query=where)

    def _do(self, statement: str) -> None:
        engine = sa.create_engine(
            self._url("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
        )
        with engine.connect() as connection:
            connection.execute(sa.text(statement))

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        user = _NOBODY if os.geteuid() == 0 else None
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [str(self._programs / program), *arguments],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=user,
                group=user,
                extra_groups=[] if user else None,
                start_new_session=True,
            )


def _programs() -> Path:
    found = shutil.which("postgres")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        raise NoPostgresError("PostgreSQL is not installed (Debian: postgresql)")
    return folders[-1]
