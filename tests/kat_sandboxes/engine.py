"""A container engine for tests: one that answers already, or a dockerd of our own that leaves nothing."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import psutil
from docker.errors import DockerException
from docker.utils import kwargs_from_env
from requests.exceptions import RequestException

from tests.kat_sandboxes import rootfs

BASE = "localhost/katcore-test-base:latest"
"""The image that tests start from."""
START_S = 90.0


class NoEngineError(Exception):
    """Why there is none."""


def client(url: str) -> Any:
    """The SDK's client; raises what it raises."""
    return docker.APIClient(base_url=url, version="auto", timeout=60)


def answering() -> str | None:
    """The address of an engine that is there already and that we may use."""
    url = str(kwargs_from_env().get("base_url") or "unix:///var/run/docker.sock")
    if "DOCKER_HOST" not in os.environ and not Path("/var/run/docker.sock").exists():
        return None
    with contextlib.suppress(DockerException, RequestException):
        client(url)
        return url
    return None


def marked(url: str) -> list[str]:
    """The names of all containers that katcore made."""
    found = client(url).containers(all=True, filters={"label": "katcore.mark"})
    return [item["Names"][0].strip("/") for item in found]


@contextlib.contextmanager
def prepared(url: str) -> Iterator[str]:
    """It has the base image meanwhile; afterwards, no image that it did not have before."""
    before = _images(url)
    _load(url)
    yield url
    for tag in sorted(_images(url) - before):
        client(url).remove_image(tag, force=True)


def _images(url: str) -> set[str]:
    found = client(url).images()
    return {
        tag
        for item in found
        for tag in item["RepoTags"] or ()
        if tag.startswith("localhost/katcore-")
    }


def _load(url: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        rootfs.write(Path(file.name))
        name, _, tag = BASE.partition(":")
        client(url).import_image_from_file(file.name, name, tag)


class Dockerd:
    """Docker's engine in mount and network namespaces of its own: it changes nothing of the machine's."""

    def __init__(self) -> None:
        if os.geteuid() or not shutil.which("dockerd"):
            raise NoEngineError(
                "no engine answers, and to start one takes root and dockerd (Debian: docker.io)"
            )
        self._keys = Path("/etc/docker").exists()
        self.folder = Path(tempfile.mkdtemp(prefix="katcore-engine-"))
        self.url = f"unix://{self.folder}/socket"
        inside = "mount -t tmpfs none /run; [ ! -d /etc/docker ] || mount -t tmpfs none /etc/docker"
        self._namespaces = subprocess.Popen(
            ["unshare", "--mount", "--net", "sh", "-c", f"{inside}; echo; exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        assert self._namespaces.stdout
        self._namespaces.stdout.readline()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        enter = ["nsenter", "-t", str(self._namespaces.pid), "-m", "-n", "--wd=/"]
        options = [f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec"]
        options += [f"--pidfile={self.folder}/pid", f"--host={self.url}", "--iptables=false"]
        options += [f"--cgroup-parent=/{self.folder.name}", "--bridge=none", "--live-restore"]
        # With us it dies, too: its parent is this thread.
        command = [
            "nice",
            "-n",
            "19",
            *enter,
            "setpriv",
            "--pdeathsig",
            "KILL",
            "dockerd",
            *options,
        ]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until_s = time.monotonic() + START_S
        while True:
            with contextlib.suppress(DockerException, RequestException):
                client(self.url)
                return
            if self._process.poll() is not None or time.monotonic() > until_s:
                said = (self.folder / "log").read_text(errors="replace").splitlines()
                raise NoEngineError(f"dockerd does not start: {' '.join(said[-2:])[-400:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9, with the containerd that it started: containers and their shims stay."""
        assert self._process
        children = psutil.Process(self._process.pid).children()
        self._process.kill()
        self._process.wait()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=30)
        for file in ("pid", "exec/containerd/containerd.pid"):
            (self.folder / file).unlink(missing_ok=True)

    def close(self) -> None:
        """End it with all containers, and remove what it made."""
        if self._process and self._process.poll() is None:
            with contextlib.suppress(DockerException, RequestException):
                api = client(self.url)
                for item in api.containers(all=True):
                    api.remove_container(item["Id"], force=True, v=True)
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        for process in self._left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
                process.wait(10)
        self._namespaces.kill()
        self._namespaces.wait()
        assert self._namespaces.stdout
        self._namespaces.stdout.close()
        shutil.rmtree(self.folder)
        for group in Path("/sys/fs/cgroup").glob(f"**/{self.folder.name}"):
            _empty(group)
        if not self._keys:
            shutil.rmtree("/etc/docker", ignore_errors=True)

    def _left(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.folder) in word for word in process.info["cmdline"] or ()):
                yield process


def _empty(group: Path) -> None:
    """End all that is in a cgroup, which may be there without anybody that watches over it, and remove it."""
    until_s = time.monotonic() + 10
    while group.exists():
        for pid in {
            pid for file in group.rglob("cgroup.procs") for pid in file.read_text().split()
        }:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            for inner in (*group.glob("*/"), group):
                inner.rmdir()
        except OSError:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
