"""Pods of real containers whose streams break, whose node kills them, or whose owner dies."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from kat_sandboxes.kubernetes.backend import KubernetesBackend
from kat_sandboxes.kubernetes.config import KubernetesConfig
from katcore.errors import EvictedError, ImageMissingError
from katcore.protocols import SupportsHandle
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import output
from tests.kat_sandboxes.cluster import Cluster
from tests.kat_sandboxes.engine import BASE, client
from tests.kat_sandboxes.kubelets import EngineKubelet
from tests.kat_sandboxes.machines import environment

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    kubelet = EngineKubelet(engine)
    made = Cluster(kubelet)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("kat")
        patch.setenv("KATCORE_HOME", str(folder))
        async with made.serve(folder) as kubeconfig:
            patch.setenv("KUBECONFIG", str(kubeconfig))
            yield made
    kubelet.close()


@pytest_asyncio.fixture(loop_scope="module")
async def backend(cluster: Cluster, engine: str) -> AsyncIterator[KubernetesBackend]:
    config = KubernetesConfig(registry="localhost", pushes=False, engine=engine, patience_s=15)
    made = KubernetesBackend(config)
    yield made
    await made.close()
    assert not cluster.pods


@pytest.fixture
def spec(tmp_path: Path) -> SandboxSpec:
    return SandboxSpec(environment(tmp_path / "environment", f"FROM {BASE}\nWORKDIR /work\n"))


async def test_a_command_survives_streams_that_are_cut(
    cluster: Cluster, backend: KubernetesBackend, spec: SandboxSpec
) -> None:
    async with backend.open(spec) as sandbox:
        before = cluster.seen.count("GET exec")
        command = "sleep 3; head -c 900000 /dev/zero | tr '\\0' x; echo end"
        running = asyncio.create_task(output(sandbox, command))
        for _ in range(3):
            await asyncio.sleep(1)
            await cluster.cut()
        said = await running
        assert (len(said), said[-3:]) == (900_003, "end")
        assert cluster.seen.count("GET exec") > before
        data = bytes(range(256)) * 20_000
        writing = asyncio.create_task(sandbox.write("/work/data", data))
        await cluster.cut()
        await writing
        assert await sandbox.read("/work/data") == data


async def test_an_api_that_is_away_for_a_while_loses_no_sandbox(
    cluster: Cluster, backend: KubernetesBackend, spec: SandboxSpec
) -> None:
    async with backend.open(spec) as sandbox:
        await sandbox.write("/work/kept", b"kept")
        cluster.is_away = True
        await cluster.cut()
        await cluster.break_watches()
        await asyncio.sleep(3)
        cluster.is_away = False
        assert await sandbox.read("/work/kept") == b"kept"


async def test_a_pod_that_is_evicted_says_so(
    cluster: Cluster, backend: KubernetesBackend, spec: SandboxSpec, engine: str
) -> None:
    async with backend.open(spec) as sandbox:
        assert isinstance(sandbox, SupportsHandle)
        client(engine).kill(f"{sandbox.handle()}.sandbox")
        with pytest.raises(EvictedError):
            await sandbox.exec(["true"])


async def test_what_a_dead_process_left_ends_by_itself(
    cluster: Cluster, backend: KubernetesBackend, spec: SandboxSpec
) -> None:
    async with backend.open(replace(spec, serves="rollout")) as sandbox:
        assert isinstance(sandbox, SupportsHandle)
        name = sandbox.handle()
        backend._pods._task.cancel()  # type: ignore[union-attr]
        # Nobody comes back, as after kill -9.
        cluster.answers = [("GET exec", 503, {}, "")] * 1000
        await cluster.cut()
        async with asyncio.timeout(60):
            while cluster.pods[name]["status"]["phase"] == "Running":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        cluster.answers = []


async def test_what_a_registry_does_not_take_is_said(
    engine: str, cluster: Cluster, spec: SandboxSpec
) -> None:
    backend = KubernetesBackend(KubernetesConfig(registry="127.0.0.1:9/x", engine=engine))
    with pytest.raises(ImageMissingError, match="cannot be pushed"):
        async with backend.open(spec):
            pass
    await backend.close()
    for tag in client(engine).images(filters={"reference": "127.0.0.1:9/x/*"}):
        client(engine).remove_image(tag["RepoTags"][0], force=True)
