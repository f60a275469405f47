"""What a sandbox is to the cluster: a pod that can do nothing but serve its channel."""

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_sandboxes import capacity
from kat_sandboxes.docker import bundle
from kat_sandboxes.docker.engine import MARK
from kat_sandboxes.kubernetes import relay
from kat_sandboxes.kubernetes.config import KubernetesConfig
from katcore.schema.task import SandboxSpec

SANDBOX, CHANNEL = "sandbox", "channel"
"""The containers of a pod."""
IS_SANDBOX = "katcore.sandbox"
"""The label that the network policy denies all traffic."""
POLICY = "katcore-sandboxes"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
NOBODY = 65534
_CHANNEL_MIB = 128
_SPARE_MIB = 256
"""Of ephemeral storage beyond the sandbox's disk: the agent and its Python, and what kubelets round up."""
_RELAY, _AGENT = "kat_sandboxes.kubernetes.relay", "kat_sandboxes.kubernetes.agent"
MODULES = (_AGENT, _RELAY)
"""What the bundle of pods has."""


@dataclass(frozen=True, slots=True)
class Images:
    """The image of a sandbox, and that of what runs beside it; where a bundle of the same content is here."""

    sandbox: str
    channel: str
    bundle: Path


def pump(agent: Path) -> list[str]:
    """What is executed beside a sandbox to reach it."""
    return bundle.python(agent, _RELAY, "pump")


def pod(
    name: str, mark: str, spec: SandboxSpec, images: Images, config: KubernetesConfig
) -> dict[str, Any]:
    """The pod of one sandbox."""
    own: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "hostname": "sandbox",
        # No name is resolved, even where a network policy lets DNS through.
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["127.0.0.1"]},
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "nodeSelector": {
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": _MACHINES.get(platform.machine(), platform.machine()),
            **config.node_selector,
        },
        "tolerations": list(config.tolerations),
        "imagePullSecrets": [{"name": secret} for secret in config.pull_secrets],
        "volumes": [
            {"name": "shared", "emptyDir": {}},
            {"name": "socket", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {"name": "own", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        ],
        "initContainers": [
            _beside("unpack", bundle.python(images.bundle, _RELAY, "unpack"), images)
        ],
        "containers": [_channel(images, config), _sandbox(spec, images, config)],
    }
    own |= {"runtimeClassName": config.runtime_class} if config.runtime_class else {}
    own |= {"activeDeadlineSeconds": config.deadline_s} if config.deadline_s else {}
    own |= {"hostUsers": config.host_users} if config.host_users is not None else {}
    labels = {**config.labels, MARK: mark, IS_SANDBOX: "true"}
    about = {"name": name, "labels": labels, "annotations": {"katcore.serves": spec.serves}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": own}


def policy() -> dict[str, Any]:
    """No traffic for sandboxes, in or out: their door leads through the API's `exec`."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": POLICY},
        "spec": {
            "podSelector": {"matchLabels": {IS_SANDBOX: "true"}},
            "policyTypes": ["Ingress", "Egress"],
        },
    }


def _sandbox(spec: SandboxSpec, images: Images, config: KubernetesConfig) -> dict[str, Any]:
    security: dict[str, Any] = {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "capabilities": {"drop": ["ALL"]},
    }
    if config.user is not None:
        security |= {"runAsUser": config.user, "runAsNonRoot": config.user != 0}
    cpus = capacity.cores(spec, config.cpus)
    size = {
        "memory": f"{spec.memory_mib}Mi",
        "ephemeral-storage": f"{spec.disk_mib + _SPARE_MIB}Mi",
    }
    mounts = [
        {"name": "shared", "subPath": "agent", "mountPath": bundle.INSIDE, "readOnly": True},
        {"name": "socket", "mountPath": str(Path(relay.CHANNEL).parent), "readOnly": True},
    ]
    if spec.tools:
        mounts.append(
            {"name": "shared", "subPath": "tools", "mountPath": "/opt/scaffold", "readOnly": True}
        )
    return {
        "name": SANDBOX,
        "image": images.sandbox,
        "imagePullPolicy": "IfNotPresent",
        "command": bundle.python(images.bundle, _AGENT, "main", relay.CHANNEL),
        # Of the image's variables, this one would reach into the agent.
        "env": [{"name": "LD_PRELOAD", "value": ""}],
        "resources": {
            "requests": {**size, "cpu": str(min(config.cpu_request, cpus or config.cpu_request))},
            "limits": {**size, **({"cpu": str(cpus)} if cpus else {})},
        },
        "securityContext": security,
        "volumeMounts": mounts,
    }


def _channel(images: Images, config: KubernetesConfig) -> dict[str, Any]:
    made = _beside(
        CHANNEL, bundle.python(images.bundle, _RELAY, "main", f"{config.patience_s:g}"), images
    )
    made["volumeMounts"] = [
        {"name": "socket", "mountPath": str(Path(relay.CHANNEL).parent)},
        {"name": "own", "mountPath": str(Path(relay.CONTROL).parent)},
    ]
    return made


def _beside(name: str, command: list[str], images: Images) -> dict[str, Any]:
    size = {"memory": f"{_CHANNEL_MIB}Mi"}
    return {
        "name": name,
        "image": images.channel,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        "resources": {"requests": {"memory": "32Mi", "cpu": "10m"}, "limits": size},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": NOBODY,
            "runAsGroup": NOBODY,
        },
        "volumeMounts": [{"name": "shared", "mountPath": relay.SHARED}],
    }
