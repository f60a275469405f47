"""The process that forks sandboxes. One per backend; it dies with the backend, and all sandboxes with it."""

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

from kat_sandboxes.zygote import cgroups, frame, kernel, sandbox, template, warm


def main() -> None:
    """Serve requests that arrive on file descriptor 0."""
    requests = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    settings = json.loads(requests.recv(1 << 16) or b"{}")
    kernel.die_with_parent()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        groups = cgroups.Groups.find(settings["name"])
        enter(settings)
        preload(settings["interpreter"])
        kernel.become_subreaper()
        gc.collect()
        gc.freeze()
        gc.disable()
        server = Server(requests, settings, groups, template.start(requests))
    except OSError as error:
        requests.send(json.dumps({"error": str(error)}).encode())
        return
    limits = {"limits": groups.kind, "has_cpu": groups.has_cpu, "note": groups.note}
    requests.send(json.dumps(limits).encode())
    with contextlib.suppress(ConnectionError, ChildProcessError):
        server.serve()
    server.end_all()
    groups.remove()


def enter(settings: dict[str, Any]) -> None:
    """Enter a mount namespace that shows what sandboxes share, and nothing else of the machine."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(kernel.NEW_NS | (kernel.NEW_USER if uid else 0))
    if uid:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    kernel.mount("none", "/", flags=kernel.RECURSIVE | kernel.PRIVATE)
    base = settings["root"]
    kernel.mount("tmpfs", base, "tmpfs", kernel.NO_SUID, "size=1m,mode=755")
    for folder in ("stage", "dev", "proc", *settings["binds"]):
        os.makedirs(base + "/" + folder.lstrip("/"), exist_ok=True)
    for link, target in settings["links"].items():
        os.symlink(target, base + link)
    kernel.mount(
        "tmpfs", f"{base}/dev", "tmpfs", kernel.NO_SUID | kernel.NO_EXEC, "size=64k,mode=755"
    )
    for name in ("null", "zero", "full", "random", "urandom"):
        with open(f"{base}/dev/{name}", "w"):
            pass
        kernel.mount(f"/dev/{name}", f"{base}/dev/{name}", flags=kernel.BIND)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("shm", "/tmp"),
                         ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):  # fmt: skip
        os.symlink(target, f"{base}/dev/{name}")
    kernel.mount("none", f"{base}/dev", flags=kernel.BIND | kernel.REMOUNT | kernel.READ_ONLY)
    for target, source in settings["binds"].items():
        kernel.bind(source, base + target, read_only=True)
    for folder in ("/proc", *cgroups.PLACES):
        os.makedirs(base + folder, exist_ok=True)
        kernel.bind(folder, base + folder, read_only=False)
    kernel.enter_root(base)


def preload(path: list[str]) -> None:
    """Import what sandboxed Python will want, from where sandboxes have it."""
    sys.path[:] = path
    for name in warm.PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


class Server:
    """Opens a sandbox per request, and ends it when told."""

    def __init__(
        self,
        requests: socket.socket,
        settings: dict[str, Any],
        groups: cgroups.Groups,
        forks: socket.socket,
    ) -> None:
        self._forks = forks
        self._requests = requests
        self._settings = settings
        self._groups = groups
        self._open: dict[int, tuple[int, str]] = {}
        self._graders: dict[int, int] = {}

    def serve(self) -> None:
        """Until the backend closes."""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._requests, 1 << 16, 1)
            if not data:
                return
            request = json.loads(data)
            if descriptors:
                make = self._grade if "grades" in request else self._make
                make(request, socket.socket(fileno=descriptors[0]))
            else:
                self._requests.send(json.dumps({"cause": self._end(request["id"])}).encode())

    def end_all(self) -> None:
        """End what is still open."""
        for identifier in list(self._open):
            self._end(identifier)

    def _make(self, request: dict[str, Any], channel: socket.socket) -> None:
        spec = {key: self._settings[key] for key in ("shared", "interpreter", "overlay")} | request
        group = ""
        with channel:
            try:
                group = self._groups.take(cgroups.Limits(**request["limits"]))
                spec["groups"] = self._groups.doors(group)
                pid = template.fork(self._forks, spec, channel.fileno())
            except ChildProcessError:
                raise
            except OSError as error:
                channel.sendall(frame.failed(error))
                self._groups.give_back(group)
            else:
                self._open[request["id"]] = (pid, group)

    def _grade(self, request: dict[str, Any], channel: socket.socket) -> None:
        """Start the grader of an open sandbox, in its namespaces."""
        with contextlib.closing(channel):
            identifier = request["grades"]
            self._end_grader(identifier)
            target, group = self._open.get(identifier, (0, ""))  # it may have ended meanwhile
            try:
                kernel.enter_namespaces(target, kernel.NEW_PID)
                try:
                    pid = os.fork()
                    if pid == 0:
                        self._requests.close()
                        cgroups.join(self._groups.doors(group))
                        sandbox.grade(channel, request)
                finally:
                    kernel.enter_namespaces(os.getpid(), kernel.NEW_PID)
            except OSError as error:
                channel.sendall(frame.failed(error))
            else:
                self._graders[identifier] = pid

    def _end_grader(self, identifier: int) -> None:
        """Before its sandbox: that ends when all in its pid namespace have been waited for."""
        if pid := self._graders.pop(identifier, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _end(self, identifier: int) -> str:
        """End a sandbox. What had ended it before: "memory", "killed", or neither."""
        self._end_grader(identifier)
        pid, group = self._open.pop(identifier, (0, ""))
        if not pid:
            return ""
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        is_full = self._groups.give_back(group)
        if not ended or not os.WIFSIGNALED(status):
            return ""
        return "memory" if is_full else "killed"
