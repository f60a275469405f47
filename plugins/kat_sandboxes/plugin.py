"""Sandbox backends."""

from collections.abc import Iterable
from typing import Any

from katcore.plugin import Offer, hookimpl
from katcore.protocols import SandboxBackend


@hookimpl
def katcore_sandboxes() -> Iterable[Offer[Any, SandboxBackend]]:
    """This machine's namespaces, a container engine, a cluster, or clouds."""
    from kat_sandboxes.docker.config import DockerConfig, make_docker
    from kat_sandboxes.harbor.config import HarborConfig, make_harbor
    from kat_sandboxes.kubernetes.config import KubernetesConfig, make_kubernetes
    from kat_sandboxes.local import LocalBackend, LocalConfig

    summary = "Linux namespaces on this machine; no daemon"
    yield Offer("local", LocalConfig, LocalBackend, summary)
    summary = "containers of an engine on this machine: Docker, or podman by its API"
    yield Offer("docker", DockerConfig, make_docker, summary)
    summary = "pods of a Kubernetes cluster; images are built here and pushed to a registry"
    yield Offer("kubernetes", KubernetesConfig, make_kubernetes, summary)
    summary = "cloud sandboxes by the harbor package (e2b, modal, daytona, ...); Python 3.12"
    yield Offer("harbor", HarborConfig, make_harbor, summary)
