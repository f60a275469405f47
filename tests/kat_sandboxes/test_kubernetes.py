"""The kubernetes backend and an API that is busy, forgetful or away; no engine is needed."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from kat_sandboxes.kubernetes import manifest, status
from kat_sandboxes.kubernetes.api import Api, GoneError
from kat_sandboxes.kubernetes.backend import KubernetesBackend
from kat_sandboxes.kubernetes.config import KubernetesConfig
from kat_sandboxes.kubernetes.manifest import Images
from kat_sandboxes.kubernetes.pods import Pods
from katcore.cli import app
from katcore.errors import (
    ConfigError,
    EvictedError,
    ImageMissingError,
    NoCapacityError,
    OutOfDiskError,
    OutOfMemoryError,
    SandboxElsewhereError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
    StartTimeoutError,
)
from katcore.schema.lease import Holder, Lease
from katcore.schema.task import SandboxSpec
from katcore.testing.sandbox.base import wait_until
from tests.kat_sandboxes.cluster import NAMESPACE, Cluster, Json, running
from tests.kat_sandboxes.kubelets import ToldKubelet

CONFIG = KubernetesConfig(registry="registry.test/katcore", patience_s=3, start_s=5)
MARK = "katcore-pods-abcdef-0123456789ab"


@pytest_asyncio.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    made = Cluster(ToldKubelet())
    async with made.serve(tmp_path) as kubeconfig:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "kat"))
        yield made


@pytest_asyncio.fixture
async def api(cluster: Cluster) -> AsyncIterator[Api]:
    made = Api(CONFIG)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def pods(api: Api) -> AsyncIterator[Pods]:
    made = Pods(api, MARK)
    yield made
    await made.close()


def a_pod(name: str = "one", mark: str = MARK, **options: Any) -> Json:
    (folder := Path(os.environ["KATCORE_HOME"]) / "bundle").mkdir(parents=True, exist_ok=True)
    (folder / "loader.json").write_text('"ld-linux.so"')
    images = Images("registry.test/environment:1", "registry.test/agent:1", folder)
    config = CONFIG.model_copy(update=options)
    return manifest.pod(name, mark, SandboxSpec(Path("/environment")), images, config)


async def create(api: Api, name: str = "one", mark: str = MARK) -> None:
    await api.call("POST", api.pods, body=a_pod(name, mark))


async def test_a_request_is_authenticated_by_the_kubeconfig(cluster: Cluster, api: Api) -> None:
    assert api.namespace == NAMESPACE
    assert (await api.call("GET", api.pods))["items"] == []


async def test_retry_after_is_waited_for(cluster: Cluster, api: Api) -> None:
    headers = {"Retry-After": "1"}
    cluster.fault("POST pods", 429, "slow down", **headers)
    began_s = asyncio.get_running_loop().time()
    await create(api)
    assert asyncio.get_running_loop().time() - began_s >= 1
    assert list(cluster.pods) == ["one"]


async def test_a_busy_server_is_asked_again(cluster: Cluster, api: Api) -> None:
    for code in (500, 503):
        cluster.fault("POST pods", code, "etcd leader changed")
    await create(api)
    assert cluster.seen.count("POST pods") == 3


async def test_an_answer_that_was_lost_makes_no_second_pod(cluster: Cluster, api: Api) -> None:
    await create(api)
    cluster.fault("POST pods", 504, "timeout")
    await create(api)
    with pytest.raises(SandboxError, match="already exists"):
        await create(api)


@pytest.mark.parametrize(
    ("code", "said", "kind"),
    [
        (403, 'pods "x" is forbidden: exceeded quota: small, requested: pods=1', NoCapacityError),
        (403, 'pods is forbidden: User "u" cannot create resource "pods"', SandboxUnavailableError),
        (401, "Unauthorized", SandboxUnavailableError),
        (404, 'namespaces "x" not found', GoneError),
        (422, "spec.containers[0].image: Required value", SandboxError),
    ],
)
async def test_a_refusal_says_its_kind(
    cluster: Cluster, api: Api, code: int, said: str, kind: type[Exception]
) -> None:
    cluster.fault("POST pods", code, said)
    with pytest.raises(kind) as caught:
        await create(api)
    assert type(caught.value) is kind
    assert said in str(caught.value)


async def test_an_api_that_is_away_for_a_while_is_waited_for(cluster: Cluster, api: Api) -> None:
    cluster.is_away = True
    waiting = asyncio.create_task(create(api))
    await wait_until(lambda: len(cluster.seen) >= 2)
    cluster.is_away = False
    await waiting
    assert list(cluster.pods) == ["one"]


async def test_an_api_that_stays_away_is_a_failure_of_the_start(cluster: Cluster, api: Api) -> None:
    await api.call("GET", api.pods)
    cluster.is_away = True
    with pytest.raises(StartTimeoutError, match="does not serve"):
        await create(api)


async def test_without_an_api_from_the_start_nothing_is_tried_for_long(
    cluster: Cluster, api: Api
) -> None:
    cluster.is_away = True
    with pytest.raises(SandboxUnavailableError, match="KUBECONFIG"):
        await create(api)


async def test_without_a_kubeconfig_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    api = Api(CONFIG)
    with pytest.raises(SandboxUnavailableError, match="Set KUBECONFIG"):
        await api.call("GET", api.pods)


async def test_all_pods_share_one_watch(cluster: Cluster, api: Api, pods: Pods) -> None:
    names = [f"pod-{number}" for number in range(20)]
    for name in names:
        pods.expect(name)
    waiting = [asyncio.create_task(pods.ready(name, 10)) for name in names]
    await asyncio.gather(*(create(api, name) for name in names))
    for name in names:
        await cluster.tell(name, running())
    await asyncio.gather(*waiting)
    assert cluster.watches == 1


async def test_a_watch_that_breaks_goes_on_where_it_was(
    cluster: Cluster, api: Api, pods: Pods
) -> None:
    pods.expect("one")
    waiting = asyncio.create_task(pods.ready("one", 10))
    await create(api)
    await wait_until(lambda: cluster.watches == 1)
    await cluster.break_watches()
    await cluster.tell("one", running())
    await waiting
    await wait_until(lambda: cluster.watches == 2)
    assert cluster.seen.count("GET pods") == 3


async def test_a_watch_from_too_long_ago_begins_anew(
    cluster: Cluster, api: Api, pods: Pods
) -> None:
    pods.expect("one")
    pods.expect("two")
    waiting = asyncio.create_task(pods.ready("one", 10))
    await create(api)
    await create(api, "two")
    await wait_until(lambda: cluster.watches == 1 and "two" in pods._known)
    cluster.is_away = True
    await cluster.break_watches()
    await cluster.tell("two", {}, "DELETED")
    await cluster.tell("one", running())
    cluster.compact()
    cluster.is_away = False
    await waiting
    with pytest.raises(EvictedError, match="two was deleted"):
        await pods.ready("two", 5)


async def test_foreign_pods_are_not_watched(cluster: Cluster, api: Api, pods: Pods) -> None:
    pods.expect("one")
    await create(api, "one", "katcore-pods-abcdef-of-another")
    await cluster.tell("one", running())
    with pytest.raises(StartTimeoutError, match="nothing was heard"):
        await pods.ready("one", 0.5)


def seen(state: Json | None = None, container: str = "sandbox", **more: Any) -> Json:
    listed = [{"name": container, "state": state}] if state else []
    found = {"phase": "Pending", "containerStatuses": listed, **more}
    return {"metadata": {"name": "one"}, "status": found}


@pytest.mark.parametrize(
    ("pod", "kind"),
    [
        (
            seen({"waiting": {"reason": "ErrImagePull", "message": "manifest unknown"}}),
            ImageMissingError,
        ),
        (seen({"waiting": {"reason": "InvalidImageName", "message": "x"}}), ImageMissingError),
        (
            seen({"waiting": {"reason": "CreateContainerConfigError", "message": "runs as root"}}),
            SandboxUnavailableError,
        ),
        (seen({"terminated": {"reason": "OOMKilled", "exitCode": 137}}), OutOfMemoryError),
        (seen({"terminated": {"reason": "Error", "exitCode": 137}}), EvictedError),
        (seen({"terminated": {"reason": "Completed", "exitCode": 0}}), SandboxGoneError),
        (seen({"terminated": {"reason": "Error", "exitCode": 1}}, "unpack"), SandboxError),
        (
            seen(phase="Failed", reason="Evicted", message="The node was low on resource: memory"),
            EvictedError,
        ),
        (
            seen(
                phase="Failed",
                reason="Evicted",
                message="Pod ephemeral local storage usage exceeds",
            ),
            OutOfDiskError,
        ),
        (seen(phase="Failed", reason="DeadlineExceeded"), SandboxGoneError),
        (seen(phase="Failed", reason="NodeLost"), EvictedError),
        (
            seen(
                conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "Preemption"}]
            ),
            EvictedError,
        ),
    ],
)
def test_what_a_status_means(pod: Json, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        status.is_ready(pod)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("pod", "kind"),
    [
        (
            seen(
                conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]
            ),
            NoCapacityError,
        ),
        (
            seen({"waiting": {"reason": "ErrImagePull", "message": "i/o timeout"}}),
            StartTimeoutError,
        ),
        (None, StartTimeoutError),
    ],
)
def test_why_a_pod_is_late(pod: Json | None, kind: type[Exception]) -> None:
    assert pod is None or not status.is_ready(pod)
    assert type(status.late(pod, "one", 5)) is kind


async def test_a_pod_whose_node_is_lost_says_so(cluster: Cluster, api: Api, pods: Pods) -> None:
    pods.expect("one")
    waiting = asyncio.create_task(pods.ready("one", 10))
    await create(api)
    await cluster.tell("one", running())
    await waiting
    lost = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}
    await cluster.tell("one", running() | {"conditions": [lost]})
    assert "NodeStatusUnknown" in str(await pods.end("one", 0.5))


async def test_a_sweep_removes_what_carries_the_mark_and_nothing_else(
    cluster: Cluster, api: Api
) -> None:
    backend = KubernetesBackend(CONFIG)
    mark = backend.mark().rsplit("-", 1)[0] + "-0123456789ab"
    await create(api, f"{mark}-1", mark)
    await create(api, "foreign", "other")
    await backend.sweep(Holder("h", "kubernetes", "{}", mark, "host", "1"))
    assert list(cluster.pods) == ["foreign"]
    await backend.sweep(Holder("h", "kubernetes", "{}", mark, "host", "1"))
    await backend.destroy(Lease("l", "h", handle=f"{mark}-1"))
    await backend.close()


async def test_what_another_cluster_has_is_not_said_to_be_gone(cluster: Cluster) -> None:
    backend = KubernetesBackend(CONFIG)
    with pytest.raises(SandboxElsewhereError, match="another cluster"):
        await backend.destroy(Lease("l", "h", handle="katcore-pods-000000-0123456789ab-1"))
    await backend.close()


async def test_the_manifest_locks_the_pod_up(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian:12\n")
    options = {"pull_secrets": ("mine",), "runtime_class": "gvisor", "user": 1000}
    backend = KubernetesBackend(CONFIG.model_copy(update=options))
    made = json.loads(await backend.manifest(SandboxSpec(tmp_path, 100, cpus=0.05, serves="r/1")))
    await backend.close()
    policy, pod = made["items"]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(policy["spec"])
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    assert selected <= pod["metadata"]["labels"].items()
    assert pod["metadata"]["namespace"] == NAMESPACE
    assert pod["metadata"]["annotations"]["katcore.serves"] == "r/1"
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["runtimeClassName"] == "gvisor"
    assert spec["imagePullSecrets"] == [{"name": "mine"}]
    for container in (*spec["initContainers"], *spec["containers"]):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["runAsNonRoot"] is True
        assert container["image"].startswith("registry.test/katcore/")
    sandbox = next(item for item in spec["containers"] if item["name"] == "sandbox")
    assert sandbox["resources"]["limits"]["memory"] == "100Mi"
    # A request of more than the limit is refused.
    assert {sandbox["resources"][kind]["cpu"] for kind in ("requests", "limits")} == {"0.05"}
    assert all(mount["readOnly"] for mount in sandbox["volumeMounts"])
    assert not cluster.pods
    assert not cluster.seen


def test_kat_sandbox_manifest_prints_it(tmp_path: Path) -> None:
    task = tmp_path / "task"
    for name in ("environment/Dockerfile", "tests/test.sh", "instruction.md", "task.toml"):
        (task / name).parent.mkdir(parents=True, exist_ok=True)
        (task / name).write_text("")
    options = json.dumps({"registry": "registry.test/x"})
    command = ["sandbox", "manifest", str(task), "--options", options]
    done = CliRunner().invoke(app, command, env={"KATCORE_HOME": str(tmp_path / "kat")})
    assert done.exit_code == 0, done.output
    kinds = [item["kind"] for item in json.loads(done.stdout)["items"]]
    assert kinds == ["NetworkPolicy", "Pod"]
    for other in (["--backend", "local"], ["--options", "[1]"]):
        assert CliRunner().invoke(app, [*command, *other]).exit_code == 2


async def test_without_a_registry_it_says_what_to_set(cluster: Cluster, tmp_path: Path) -> None:
    backend = KubernetesBackend(KubernetesConfig())
    with pytest.raises(ConfigError, match="registry"):
        await backend.manifest(SandboxSpec(tmp_path))
    await backend.close()


async def test_without_an_engine_it_says_what_is_needed(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian:12\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    backend = KubernetesBackend(CONFIG.model_copy(update={"engine": nowhere}))
    with pytest.raises(SandboxUnavailableError, match="container engine here"):
        async with backend.open(SandboxSpec(tmp_path)):
            pass
    await backend.close()
    assert not cluster.pods
