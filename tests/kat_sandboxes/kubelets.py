"""What runs the pods of a cluster for tests: a container engine, or a test that says what becomes of them."""

import asyncio
import contextlib
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docker.errors import APIError, NotFound

from tests.kat_sandboxes.cluster import Json
from tests.kat_sandboxes.engine import client

_POLL_S = 0.2


class EngineKubelet:
    """Pods as containers of a real engine: limits, users, mounts and capabilities as the manifest says."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._folder = Path(tempfile.mkdtemp(prefix="katcore-kubelet-"))
        self._held: dict[asyncio.Task[None], Any] = {}
        """What the SDK would close with the last reference to it."""

    def close(self) -> None:
        """Remove what is left."""
        shutil.rmtree(self._folder)

    async def run(self, pod: Json, tell: Callable[[Json], None]) -> None:
        names = await asyncio.to_thread(self._start, pod)
        states: dict[str, Json] = {name: {"running": {}} for name in names}
        while True:
            phase = "Running" if all("running" in item for item in states.values()) else "Failed"
            listed = [{"name": name, "state": state} for name, state in states.items()]
            tell({"phase": phase, "containerStatuses": listed})
            before = dict(states)
            while states == before:
                await asyncio.sleep(_POLL_S)
                states = {name: await asyncio.to_thread(self._state, pod, name) for name in names}

    async def stop(self, pod: Json) -> None:
        await asyncio.to_thread(self._remove, pod)

    async def execute(
        self, pod: Json, container: str, argv: list[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        held = await asyncio.to_thread(self._executed, _called(pod, container), argv)
        held._sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=held._sock)
        plain = asyncio.StreamReader()
        work = asyncio.create_task(_unpacked(reader, plain))
        self._held[work] = held
        work.add_done_callback(lambda done: self._held.pop(done).close())
        return plain, writer

    def _executed(self, name: str, argv: list[str]) -> Any:
        api = client(self._url)
        try:
            made = api.exec_create(name, argv, stdin=True)
            return api.exec_start(made["Id"], socket=True)
        except APIError as error:
            raise OSError(str(error)) from error

    def _start(self, pod: Json) -> list[str]:
        spec = pod["spec"]
        for volume in spec["volumes"]:
            folder = self._folder / pod["metadata"]["name"] / volume["name"]
            folder.mkdir(parents=True)
            folder.chmod(0o777)
        api = client(self._url)
        network = "none"
        for item in (*spec["initContainers"], *spec["containers"]):
            name = _called(pod, item["name"])
            api.create_container_from_config(self._settings(pod, item, network), name)
            api.start(name)
            if item in spec["initContainers"]:
                code = api.wait(name)["StatusCode"]
                assert code == 0, api.logs(name)
            elif network == "none":
                network = f"container:{name}"
        return [item["name"] for item in spec["containers"]]

    def _settings(self, pod: Json, item: Json, network: str) -> Json:
        security = item["securityContext"]
        limits = item["resources"]["limits"]
        memory = int(limits["memory"].removesuffix("Mi")) << 20
        folder = self._folder / pod["metadata"]["name"]
        mounts = [
            {
                "Type": "bind",
                "Source": str(folder / mount["name"] / mount.get("subPath", "")),
                "Target": mount["mountPath"],
                "ReadOnly": mount.get("readOnly", False),
            }
            for mount in item["volumeMounts"]
        ]
        return {
            "Image": item["image"],
            "Entrypoint": item["command"],
            "Env": [f"{each['name']}={each['value']}" for each in item.get("env", ())],
            "User": str(security.get("runAsUser", "")),
            "NetworkDisabled": network == "none",
            "HostConfig": {
                "NetworkMode": network,
                "IpcMode": "private",
                "CapDrop": security["capabilities"]["drop"],
                "SecurityOpt": []
                if security["allowPrivilegeEscalation"]
                else ["no-new-privileges"],
                "ReadonlyRootfs": security.get("readOnlyRootFilesystem", False),
                "Memory": memory,
                "MemorySwap": memory,
                "NanoCpus": int(float(limits.get("cpu", 0)) * 1e9),
                "LogConfig": {"Type": "json-file"},
                "Mounts": mounts,
            },
        }

    def _state(self, pod: Json, container: str) -> Json:
        try:
            found = client(self._url).inspect_container(_called(pod, container))["State"]
        except NotFound:
            return {"terminated": {"exitCode": 137, "reason": "Error"}}
        if found["Running"]:
            return {"running": {}}
        reason = (
            "OOMKilled" if found["OOMKilled"] else "Error" if found["ExitCode"] else "Completed"
        )
        return {"terminated": {"exitCode": found["ExitCode"], "reason": reason}}

    def _remove(self, pod: Json) -> None:
        api = client(self._url)
        spec = pod["spec"]
        for item in (*spec["containers"][::-1], *spec["initContainers"]):
            with contextlib.suppress(NotFound, APIError):
                api.remove_container(_called(pod, item["name"]), force=True, v=True)
        shutil.rmtree(self._folder / pod["metadata"]["name"], ignore_errors=True)


class ToldKubelet:
    """Pods run if nothing else is told; nothing is executed in them."""

    def __init__(self) -> None:
        self.statuses: list[Json] = []

    async def run(self, pod: Json, tell: Callable[[Json], None]) -> None:
        for status in self.statuses:
            tell(status)
            await asyncio.sleep(0)

    async def stop(self, pod: Json) -> None:
        """Nothing runs."""

    async def execute(
        self, pod: Json, container: str, argv: list[str]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        raise NotImplementedError


def _called(pod: Json, container: str) -> str:
    return f"{pod['metadata']['name']}.{container}"


async def _unpacked(reader: asyncio.StreamReader, plain: asyncio.StreamReader) -> None:
    """What a command says on its output; in Docker's stream, errors are mixed in."""
    with contextlib.suppress(OSError, EOFError):
        while True:
            kind, num = struct.unpack(">BxxxI", await reader.readexactly(8))
            data = await reader.readexactly(num)
            if kind == 1:
                plain.feed_data(data)
    plain.feed_eof()
