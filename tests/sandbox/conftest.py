from collections.abc import Iterator
from pathlib import Path

import pytest

from katcore.sandbox.ledger import Ledger
from tests.conftest import NOT_RUN
from tests.sandbox.postgres import NoPostgresError, Postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server. Without PostgreSQL, the run's last lines say so."""
    try:
        made = Postgres()
    except NoPostgresError as error:
        pytest.skip(f"{NOT_RUN}: {error}")
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = Ledger()
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "machines"
    made.mkdir()
    return made
