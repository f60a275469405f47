"""The docker backend against the known tricks, on a real engine."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kat_sandboxes.docker.backend import DockerBackend
from kat_sandboxes.docker.config import DockerConfig
from katcore.testing.redteam import RedTeam
from tests.kat_sandboxes.engine import BASE

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(
    engine: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[DockerBackend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KATCORE_HOME", str(tmp_path_factory.mktemp("kat")))
        made = DockerBackend(DockerConfig(url=engine))
        yield made
        await made.close()


class TestDocker(RedTeam):
    """On an image with git and without pytest. Its programs are each container's own, to spoil."""

    dockerfile = f"FROM {BASE}\n"
    has_pytest = False
    has_fixed_programs = False
    has_disk_limit = False
