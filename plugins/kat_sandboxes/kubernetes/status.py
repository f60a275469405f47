"""What the status of a pod means: it is ready, it is not yet, or what became of it."""

import re
from typing import Any

from kat_sandboxes.kubernetes.manifest import CHANNEL, SANDBOX
from katcore.errors import (
    EvictedError,
    ImageMissingError,
    NoCapacityError,
    OutOfDiskError,
    OutOfMemoryError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
    StartTimeoutError,
)

_NO_IMAGE = re.compile(
    "not found|manifest unknown|unauthorized|denied|forbidden|does not exist|invalid reference",
    re.IGNORECASE,
)
_NEVER_PULLED = {"InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_REFUSED = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_DISK = re.compile("ephemeral|emptydir|disk", re.IGNORECASE)


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether what is in a pod runs.

    Raises:
        SandboxError: it never will; of a kind that says why.
    """
    if error := ended(pod):
        raise error
    states = _states(pod)
    for state in states.values():
        _raise_waiting(state.get("waiting", {}), _name(pod))
    return all("running" in states.get(name, {}) for name in (SANDBOX, CHANNEL))


def ended(pod: dict[str, Any]) -> SandboxError | None:
    """What became of a pod, or None if nothing is known to be wrong with it."""
    name, status = _name(pod), pod.get("status", {})
    reason, said = status.get("reason", ""), status.get("message", "")
    text = f"the pod {name}: {reason or status.get('phase')}{f', {said}' if said else ''}"
    if reason == "Evicted":
        return OutOfDiskError(text) if _DISK.search(said) else EvictedError(text)
    if reason == "DeadlineExceeded":
        return SandboxGoneError(f"{text}. The option deadline_s says how long a pod may live")
    if error := _container_ended(name, _states(pod), reason):
        return error
    if reason in ("NodeLost", "Preempting", "Terminated", "NodeShutdown", "Shutdown"):
        return EvictedError(text)
    if (cause := _disruption(status)) or pod["metadata"].get("deletionTimestamp"):
        return EvictedError(f"the pod {name} is being removed: {cause or 'it was deleted'}")
    if status.get("phase") in ("Failed", "Succeeded"):
        return SandboxGoneError(text)
    return None


def _container_ended(
    name: str, states: dict[str, dict[str, Any]], reason: str
) -> SandboxError | None:
    done = {
        container: state["terminated"]
        for container, state in states.items()
        if "terminated" in state
    }
    if SANDBOX in done:
        return _terminated(name, SANDBOX, done[SANDBOX], reason)
    # The relay ends by itself after its sandbox, whose own status may come later.
    if CHANNEL in done and (
        done[CHANNEL].get("exitCode") or "running" not in states.get(SANDBOX, {})
    ):
        return _terminated(name, CHANNEL, done[CHANNEL], reason)
    for container, state in done.items():
        if state.get("exitCode"):
            return SandboxError(
                f"the pod {name} could not be prepared: {container}: {_last(state)}"
            )
    return None


def late(pod: dict[str, Any] | None, name: str, start_s: float) -> SandboxError:
    """Why a pod is not ready, after so many seconds."""
    status = (pod or {}).get("status", {})
    for item in status.get("conditions", ()):
        if item["type"] == "PodScheduled" and item["status"] == "False":
            said = f"{item.get('reason', '')}: {item.get('message', '')}"
            return NoCapacityError(f"no node has room for the pod {name} ({said})")
    waits = [
        f"{container}: {state['waiting'].get('reason', '')} {state['waiting'].get('message', '')}"
        for container, state in _states(pod or {}).items()
        if "waiting" in state
    ]
    seen = "; ".join(waits) or status.get("phase", "nothing was heard of it")
    return StartTimeoutError(f"the pod {name} was not ready within {start_s:g} s: {seen}")


def unreachable(pod: dict[str, Any] | None, name: str) -> SandboxError:
    """Why a pod cannot be reached that has not ended."""
    for item in (pod or {}).get("status", {}).get("conditions", ()):
        if item["type"] == "Ready" and item["status"] != "True":
            return EvictedError(
                f"the node of the pod {name} does not answer: {item.get('reason', '')}"
            )
    return SandboxGoneError(f"the pod {name} cannot be reached any more")


def _states(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    status = pod.get("status", {})
    lists = (status.get("initContainerStatuses") or [], status.get("containerStatuses") or [])
    return {item["name"]: item.get("state") or {} for found in lists for item in found}


def _raise_waiting(waiting: dict[str, Any], name: str) -> None:
    reason, said = waiting.get("reason", ""), waiting.get("message", "")
    text = f"the pod {name}: {reason}, {said}"
    if reason in _NEVER_PULLED:
        raise ImageMissingError(text)
    # Registries have bad moments: what may be one is given until the start is too late.
    if reason in ("ErrImagePull", "ImagePullBackOff") and _NO_IMAGE.search(said):
        raise ImageMissingError(
            f"{text}. Look at the option pull_secrets, and at what the registry has"
        )
    if reason in _REFUSED:
        raise SandboxUnavailableError(text)


def _terminated(name: str, container: str, done: dict[str, Any], reason: str) -> SandboxError:
    text = f"the container {container} of the pod {name} has ended: {_last(done)}"
    if done.get("reason") == "OOMKilled":
        return OutOfMemoryError(f"{text}; raise its limit")
    if reason or done.get("exitCode") in (137, 143):
        return EvictedError(f"{text} {reason}".strip())
    return SandboxGoneError(text)


def _last(done: dict[str, Any]) -> str:
    return f"{done.get('reason', '')} {done.get('exitCode', '')} {done.get('message', '')}".strip()


def _disruption(status: dict[str, Any]) -> str:
    for item in status.get("conditions", ()):
        if item["type"] == "DisruptionTarget" and item["status"] == "True":
            return f"{item.get('reason', '')} {item.get('message', '')}".strip()
    return ""


def _name(pod: dict[str, Any]) -> str:
    return str(pod["metadata"]["name"])
