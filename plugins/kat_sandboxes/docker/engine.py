"""The engine: the few calls of Docker's API that sandboxes need, in threads of their own.

Through the official SDK, which Airflow's Docker provider brings along, and which knows DOCKER_HOST, TLS, and
what belongs into a build. It blocks, so it is never called on the event loop. An asynchronous client would
gain nothing: a sandbox takes four calls, commands go to its pid 1 directly, and an engine starts no more
containers with fifty calls at once than with eight.
"""

import asyncio
import hashlib
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.utils import kwargs_from_env
from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError

from katcore.errors import (
    ImageMissingError,
    KatError,
    NoCapacityError,
    OutOfDiskError,
    SandboxError,
    SandboxGoneError,
    SandboxUnavailableError,
    TaskError,
)

MARK = "katcore.mark"
"""The label that all containers of a backend carry, with its mark."""
_DOCKERFILE = ".dockerfile.katcore"
_WORKERS = 8
_TIMEOUT_S = 120
_BUILD_TIMEOUT_S = 3600
_GONE_S, _RETRY_S = 30.0, 0.1
_ENDED_S = 5
"""How long it may take until the engine knows that a container has ended."""
_KILLED = "137"
_FULL = re.compile("no space left on device|quota exceeded", re.IGNORECASE)
_REFUSALS = (
    (_FULL, OutOfDiskError),
    (re.compile("no such image", re.IGNORECASE), ImageMissingError),
    (
        re.compile("cannot allocate memory|too many open files|resource temporarily unavailable"),
        NoCapacityError,
    ),
)
_NO_PROGRAM = re.compile("executable file .*not found")
_AT_FROM = re.compile(r"step \d+/\d+ ?: FROM [^\n]*\s*$", re.IGNORECASE)
"""A build that fails with this as the last it said had no base image."""

T = TypeVar("T")


class Engine:
    """One engine, at `url` or where the environment says. All methods but `call` block."""

    def __init__(self, url: str) -> None:
        self._arguments = kwargs_from_env() | ({"base_url": url} if url else {})
        self.url: str = self._arguments.get("base_url") or "unix:///var/run/docker.sock"
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="katcore-docker")
        self._lock = threading.Lock()
        self._client: Any = None
        self._since = int(time.time())

    @property
    def place(self) -> str:
        """A short name of this address, the same on all machines that reach the same engine by it."""
        where = (
            self.url if self.url.startswith(("tcp:", "http")) else f"{platform.node()}:{self.url}"
        )
        return hashlib.sha256(where.encode()).hexdigest()[:6]

    async def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking method in a thread. Cancelled, it ends first: a container half made would be lost.

        Raises:
            SandboxUnavailableError: no engine answers.
            SandboxError: it refuses; of a kind that says why, if that is known.
        """
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._threads, self._translated, work, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            if not running.cancelled():
                running.exception()
            raise

    def close(self) -> None:
        """Let go of the connections."""
        self._threads.shutdown(wait=False)
        if self._client:
            self._client.close()

    def info(self) -> dict[str, Any]:
        """What the engine says of itself."""
        return dict(self._api().info())

    def create(self, name: str, labels: dict[str, str], settings: dict[str, Any]) -> None:
        """Make a container; `settings` are those of ContainerCreate in the API."""
        body = {**settings, "Labels": labels}
        self._api().create_container_from_config(body, name)

    def start(self, name: str) -> None:
        """Start a container."""
        self._api().start(name)

    def run_beside(self, name: str, command: list[str], user: str) -> None:
        """Start a process in a container that runs, as another user, and do not wait for it."""
        made = self._api().exec_create(name, command, user=user)
        self._api().exec_start(made["Id"], detach=True)

    def is_running(self, name: str) -> bool:
        """Whether it runs."""
        try:
            return bool(self._api().inspect_container(name)["State"]["Running"])
        except NotFound:
            return False

    def cause(self, name: str) -> str:
        """What ended a container: "memory", "killed", or "" if neither, or if it did not end."""
        filters = {"container": name, "event": ["oom", "kill", "die"]}
        until_s = int(time.time()) + _ENDED_S
        events = self._api().events(self._since, until_s, filters, decode=True)
        seen = set()
        try:
            for event in events:
                said = event["Actor"]["Attributes"]
                if said.get("name") != name:  # the filter takes what begins so, too
                    continue
                seen.add(event["Action"])
                if event["Action"] == "die":
                    if said.get("exitCode") != _KILLED:
                        return ""
                    return "memory" if "oom" in seen and "kill" not in seen else "killed"
        finally:
            events.close()
        return ""

    def changes(self, name: str) -> list[dict[str, Any]]:
        """The paths that differ from the image. Raises SandboxGoneError."""
        try:
            return list(self._api().diff(name) or [])
        except NotFound as error:
            raise SandboxGoneError(f"the container {name} is gone") from error

    def export(self, name: str) -> Iterator[bytes]:
        """All files of a container as a tar archive, but for what is mounted in it."""
        return iter(self._api().export(name, chunk_size=1 << 20))

    def finish(self, name: str) -> tuple[int, str]:
        """Start a container and wait for its end: its exit code (127: no program), and the last it said."""
        try:
            self._api().start(name)
        except APIError as error:
            said = str(error.explanation or error)
            if _NO_PROGRAM.search(said):
                return 127, said
            raise
        code = self._api().wait(name, timeout=_BUILD_TIMEOUT_S)["StatusCode"]
        return code, self._api().logs(name, tail=20)[-500:].decode(errors="replace")

    def commit(self, name: str, tag: str, config: dict[str, Any]) -> None:
        """Make an image of a container's files and this configuration."""
        repository, _, version = tag.partition(":")
        self._api().commit(name, repository, version, conf=config)

    def tag(self, tag: str, new: str) -> None:
        """Give an image one more name."""
        repository, _, version = new.rpartition(":")
        self._api().tag(tag, repository, version)

    def push(self, tag: str) -> None:
        """Send an image to the registry that its name begins with. Docker knows the credentials.

        Raises:
            ImageMissingError: the registry does not take it.
        """
        repository, _, version = tag.rpartition(":")
        for line in self._api().push(repository, version, stream=True, decode=True):
            if "error" in line:
                raise ImageMissingError(f"{tag} cannot be pushed: {line['error']}")

    def marked(self, mark: str) -> list[str]:
        """The ids of all containers with a mark, whatever state they are in."""
        found = self._api().containers(all=True, filters={"label": f"{MARK}={mark}"})
        return [item["Id"] for item in found]

    def remove(self, name: str) -> bool:
        """Kill and remove a container and its volumes; whether it was there. Returns when it is gone."""
        until_s = time.monotonic() + _GONE_S
        was_there = False
        while True:
            try:
                self._api().remove_container(name, force=True, v=True)
            except NotFound:
                return was_there
            except APIError as error:
                # Somebody removes it already: the engine itself, as it does when a container ends.
                if error.status_code != 409 or time.monotonic() > until_s:
                    raise
                was_there = True
                time.sleep(_RETRY_S)
            else:
                return True

    def image(self, tag: str) -> dict[str, Any] | None:
        """The configuration of an image, or None if there is no such image."""
        try:
            return dict(self._api().inspect_image(tag)["Config"])
        except ImageNotFound:
            return None

    def load(self, tag: str, archive: Path) -> None:
        """Make an image of a tar archive. The version in the tag is `latest`: podman knows no other here."""
        name, _, version = tag.partition(":")
        self._api().import_image_from_file(str(archive), name, version)

    def build(self, tag: str, folder: Path, dockerfile: str, network: str) -> None:
        """Build an image of a folder, by this text in place of its Dockerfile.

        Raises:
            TaskError: the engine cannot build it; with the last it said.
            ImageMissingError: it has not the image to start from, and cannot pull it.
            OutOfDiskError: there is no room for it.
        """
        said = ""
        try:
            lines = self._api().build(
                fileobj=_context(folder, dockerfile),
                custom_context=True,
                dockerfile=_DOCKERFILE,
                tag=tag,
                rm=True,
                forcerm=True,
                decode=True,
                timeout=_BUILD_TIMEOUT_S,
                network_mode=None if network == "default" else network,
            )
            for line in lines:
                said = (said + line.get("stream", ""))[-500:]
                if "error" in line:
                    raise not_built(line["error"], said)
        except APIError as error:
            raise not_built(str(error.explanation or error), said) from error

    def _translated(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return work(*arguments)
        except APIError as error:
            said = str(error.explanation or error)
            kind = next((kind for words, kind in _REFUSALS if words.search(said)), SandboxError)
            raise kind(f"the engine refuses: {said}") from error
        except (DockerException, RequestException, HTTPError) as error:
            raise SandboxUnavailableError(
                f"no container engine answers at {self.url}: {error}. Start one (dockerd, or `podman system"
                " service`), or say where it is: the option `url`, or DOCKER_HOST"
            ) from error

    def _api(self) -> Any:
        with self._lock:
            if self._client is None:
                arguments = {"timeout": _TIMEOUT_S, "num_pools": _WORKERS, **self._arguments}
                self._client = docker.APIClient(version="auto", **arguments)
            return self._client


def binds(shown: dict[str, str]) -> list[dict[str, Any]]:
    """Mounts of ContainerCreate: folders of the machine, read-only, by where they are shown."""
    return [
        {"Type": "bind", "Source": source, "Target": target, "ReadOnly": True}
        for target, source in shown.items()
    ]


def not_built(error: str, said: str) -> KatError:
    """Why there is no image, from an error and the last that was said before it."""
    text = f"{error}; before it: {said.strip()}"
    if _FULL.search(text):
        return OutOfDiskError(text)
    return ImageMissingError(text) if _AT_FROM.search(said) else TaskError(text)


def _context(folder: Path, dockerfile: str) -> Any:
    """What the engine is sent of a folder: all but what its .dockerignore says."""
    ignored = folder / ".dockerignore"
    lines = ignored.read_text().splitlines() if ignored.exists() else []
    excluded = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return docker.utils.tar(str(folder), exclude=excluded, dockerfile=(_DOCKERFILE, dockerfile))
