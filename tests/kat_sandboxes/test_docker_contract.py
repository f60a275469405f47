"""The docker backend does what every backend has to, on a real engine."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kat_sandboxes.docker.backend import DockerBackend
from kat_sandboxes.docker.config import DockerConfig
from katcore.testing.sandbox import SandboxContract
from tests.kat_sandboxes.engine import BASE

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(
    engine: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[DockerBackend]:
    with pytest.MonkeyPatch.context() as patch:
        home: Path = tmp_path_factory.mktemp("kat")
        patch.setenv("KATCORE_HOME", str(home))
        made = DockerBackend(DockerConfig(url=engine))
        yield made
        await made.close()
        assert not list((home / "docker").glob("katcore-docker-*"))


class TestDocker(SandboxContract):
    """It offers everything, but a limit of the disk: the engine's storage here cannot."""

    dockerfile = f"FROM {BASE}\nWORKDIR /work\n"
    has_disk_limit = False
