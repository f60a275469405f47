"""Options of the kubernetes backend, and how it is made: the official client is imported only then."""

import importlib.util
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from katcore.errors import SandboxUnavailableError
from katcore.protocols import SandboxBackend


class KubernetesConfig(BaseModel):
    """Options of the kubernetes backend. Credentials are in the kubeconfig, or the pod's that this runs in.

    `registry` is where images are pushed to and pulled from, such as `registry.example.com/katcore`;
    `pushes: false` for nodes that have the images of this machine's engine, as minikube's may. `engine` is
    the container engine that builds them, as the docker backend's `url`, and `network` what RUN has there.
    `context` is the kubeconfig's, by default the current one; `namespace` by default the context's.
    `pull_secrets`, `node_selector`, `tolerations`, `runtime_class` and `labels` are put on each pod. `cpus`
    bounds the cores of one sandbox (0: no bound), `cpu_request` is what it is promised. `user` is the uid to
    run as (by default the image's). `host_users: false` gives each pod a user namespace. A pod has `start_s`
    to be ready, and `deadline_s` to live (0: no end). `patience_s` is for how long the API may be away before
    a sandbox is given up. So many pods are created at once as `together` says.
    `makes_policy: false`: somebody else has denied pods with the label `katcore.sandbox` all traffic.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    registry: str = ""
    pushes: bool = True
    engine: str = ""
    network: str = "default"
    context: str = ""
    namespace: str = ""
    pull_secrets: tuple[str, ...] = ()
    node_selector: dict[str, str] = {}
    tolerations: tuple[dict[str, Any], ...] = ()
    runtime_class: str = ""
    labels: dict[str, str] = {}
    cpus: float = Field(default=0.0, ge=0)
    cpu_request: float = Field(default=0.1, ge=0)
    user: int | None = Field(default=None, ge=0)
    host_users: bool | None = None
    start_s: float = Field(default=300.0, gt=0)
    deadline_s: int = Field(default=0, ge=0)
    patience_s: float = Field(default=120.0, gt=0)
    together: int = Field(default=32, ge=1)
    makes_policy: bool = True


def make_kubernetes(config: KubernetesConfig) -> SandboxBackend:
    """A backend; the cluster is not asked before the first sandbox."""
    if importlib.util.find_spec("kubernetes") is None:
        raise SandboxUnavailableError(
            "the kubernetes backend needs its client: pip install 'katcore[kubernetes]'"
        )
    from kat_sandboxes.kubernetes.backend import KubernetesBackend  # noqa: PLC0415

    return KubernetesBackend(config)
