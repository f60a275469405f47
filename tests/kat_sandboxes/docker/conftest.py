from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from kat_sandboxes.docker.backend import DockerBackend
from kat_sandboxes.docker.config import DockerConfig
from tests.kat_sandboxes.engine import marked


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder: Path = tmp_path_factory.mktemp("kat")
        patch.setenv("KATCORE_HOME", str(folder))
        yield folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(engine: str, home: Path) -> AsyncIterator[DockerBackend]:
    made = DockerBackend(DockerConfig(url=engine))
    yield made
    await made.close()
    assert marked(engine) == []
    assert not list((home / "docker").glob("katcore-docker-*"))
