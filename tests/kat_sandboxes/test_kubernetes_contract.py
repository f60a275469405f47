"""The kubernetes backend does what every backend has to: its API is ours, its pods are real containers."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kat_sandboxes.kubernetes.backend import KubernetesBackend
from kat_sandboxes.kubernetes.config import KubernetesConfig
from katcore.testing.sandbox import SandboxContract
from tests.kat_sandboxes.cluster import Cluster
from tests.kat_sandboxes.engine import BASE
from tests.kat_sandboxes.kubelets import EngineKubelet

pytestmark = [pytest.mark.docker, pytest.mark.slow]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def backend(
    engine: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[KubernetesBackend]:
    kubelet = EngineKubelet(engine)
    cluster = Cluster(kubelet)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kat")
        patch.setenv("KATCORE_HOME", str(folder))
        async with cluster.serve(folder) as kubeconfig:
            patch.setenv("KUBECONFIG", str(kubeconfig))
            made = KubernetesBackend(
                KubernetesConfig(registry="localhost", pushes=False, engine=engine, patience_s=20)
            )
            yield made
            await made.close()
            assert not cluster.pods
    kubelet.close()


class TestKubernetes(SandboxContract):
    """It offers all but two limits: a pod's processes are limited by its kubelet, its disk by eviction."""

    dockerfile = f"FROM {BASE}\nWORKDIR /work\n"
    has_process_limit = False
    has_disk_limit = False
