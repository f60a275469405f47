from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from kat_sandboxes.local import LocalBackend, LocalConfig
from katcore.protocols import Sandbox
from katcore.schema.task import SandboxSpec
from tests.conftest import NOT_RUN
from tests.kat_sandboxes.engine import Dockerd, NoEngineError, answering, prepared
from tests.kat_sandboxes.machines import environment


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kat") / "images"


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SandboxSpec:
    """The machine's own programs, and an empty folder to work in."""
    return SandboxSpec(environment(tmp_path_factory.mktemp("plain")))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(images: Path) -> AsyncIterator[LocalBackend]:
    made = LocalBackend(LocalConfig(images=images, scaffolds=images.with_name("scaffolds")))
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def sandbox(backend: LocalBackend, plain: SandboxSpec) -> AsyncIterator[Sandbox]:
    async with backend.open(plain) as made:
        yield made


@pytest.fixture(scope="session")
def engine() -> Iterator[str]:
    """The address of a container engine that has the base image. Without one, the run's last lines say so."""
    found = answering()
    own: Dockerd | None = None
    try:
        if found is None:
            own = Dockerd()
            own.start()
            found = own.url
        with prepared(found):
            yield found
    except NoEngineError as error:
        pytest.skip(f"{NOT_RUN}: {error}")
    finally:
        if own:
            own.close()
