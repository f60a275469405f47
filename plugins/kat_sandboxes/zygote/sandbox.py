"""One sandbox: builds its root, gives up all privileges, then serves as its pid 1."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

from kat_sandboxes.zygote import cgroups, files, frame, kernel, live, machine, warm

_MASKED = (
    "kallsyms", "keys", "key-users", "kpagecgroup", "kpagecount", "kpageflags", "pagetypeinfo", "slabinfo",
    "timer_list", "vmallocinfo",
)  # fmt: skip
"""What /proc says of the whole machine, to root even without capabilities; no program needs it."""


def build_root(spec: dict[str, Any]) -> tuple[int, list[int]]:
    """Enter a private root over the spec's layers; returns descriptors of its upper and lower folders."""
    options = f"size={spec['disk_mib']}m,mode=755"
    kernel.mount("tmpfs", "/stage", "tmpfs", kernel.NO_SUID | kernel.NO_DEV, options)
    os.chdir("/stage")
    for folder in ("upper", "work", "root"):
        os.mkdir(folder)
    layers = spec["layers"]
    options = f"lowerdir={':'.join(layers)},upperdir=upper,workdir=work"
    kernel.mount(
        "overlay", "root", "overlay", kernel.NO_SUID | kernel.NO_DEV, options + spec["overlay"]
    )
    for folder in spec["shared"]:
        kernel.mount(folder, f"root{folder}", flags=kernel.BIND | kernel.RECURSIVE)
    if spec["tools"]:
        kernel.mount(spec["tools"], "root/opt/scaffold", flags=kernel.BIND | kernel.RECURSIVE)
    flags = kernel.NO_SUID | kernel.NO_DEV | kernel.NO_EXEC | kernel.READ_ONLY
    kernel.mount("proc", "root/proc", "proc", flags)
    for name in _MASKED:
        if os.path.exists(f"root/proc/{name}"):
            kernel.mount("/dev/null", f"root/proc/{name}", flags=kernel.BIND)
    kernel.mount("/dev/null", "root/etc/ld.so.preload", flags=kernel.BIND)
    cache = f"{layers[-1]}/etc/ld.so.cache"
    if os.path.exists(cache):  # the machine's: its programs are fixed, so what they load is
        kernel.mount(cache, "root/etc/ld.so.cache", flags=kernel.BIND)
    upper = os.open("upper", os.O_PATH | os.O_DIRECTORY)
    lowers = [os.open(layer, os.O_PATH | os.O_DIRECTORY) for layer in layers]
    kernel.enter_root("root")
    if spec["is_live"]:
        for folder in live.FOLDERS:
            options = f"size={spec['disk_mib']}m,mode=700,uid={live.GRADER},gid={live.GRADER}"
            kernel.mount("tmpfs", folder, "tmpfs", kernel.NO_SUID | kernel.NO_DEV, options)
    return upper, lowers


def run(channel: socket.socket, spec: dict[str, Any]) -> None:
    """The whole life of a sandbox. Never returns."""
    try:
        kernel.die_with_parent()
        cgroups.join(spec["groups"])
        os.setsid()
        upper, listener, door, *lowers = made_apart(channel, lambda: _set_up(spec))
        machine.limit(spec["disk_mib"])
        kernel.drop_privileges()
        machine.lock()
        doors = [door] if door >= 0 else []
        socket.send_fds(channel, [frame.pack({"ok": True})], doors)
        for number in doors:
            os.close(number)
        channel.recv(1, socket.MSG_PEEK)  # the rest is made when it is asked for something
        root = files.Root(upper, lowers)
        python = warm.Python(
            socket.socket(fileno=listener), (channel, root), tuple(spec["interpreter"])
        )
        served = machine.Machine(channel, spec, lambda _: root.changes(), python)
        served.serve()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other end has to hear of it
        with contextlib.suppress(OSError):
            channel.sendall(frame.failed(error))
    os._exit(0)


def made_apart(channel: socket.socket, make: Callable[[], list[int]]) -> list[int]:
    """The descriptors that `make` opens, called in a process that shares nothing but these and the root.

    The memory that Python writes to on the way goes with that process. If it fails it says so to `channel`,
    and this one ends too.
    """
    end, theirs = os.pipe()
    pid = kernel.fork_into(kernel.SAME_FILES | kernel.SAME_ROOT)
    if pid == 0:
        try:
            os.write(theirs, b" ".join(b"%d" % number for number in make()))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the other end has to hear of it
            with contextlib.suppress(OSError):
                channel.sendall(frame.failed(error))
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        os._exit(0)
    found = [int(number) for number in os.read(end, 4096).split()]
    os.close(end)
    os.close(theirs)
    return found


def _set_up(spec: dict[str, Any]) -> list[int]:
    """Build the root and what listens in it: the upper folder, warm Python, the door or -1, lower folders."""
    socket.sethostname("sandbox")
    upper, lowers = build_root(spec)
    kernel.loopback_up()
    listener = socket.create_server(("127.0.0.1", warm.PORT), backlog=64)
    door = [item.detach() for item in machine.doors(spec)] or [-1]
    return [upper, listener.detach(), *door, *lowers]


def grade(channel: socket.socket, spec: dict[str, Any]) -> None:
    """Serve in the sandbox whose pid namespace this process is in, as the grader. Never returns."""
    try:
        low = channel.dup()
        channel.close()
        channel = low
        kernel.enter_namespaces(1, kernel.NEW_NS | kernel.NEW_UTS | kernel.NEW_IPC | kernel.NEW_NET)
        os.setsid()
        machine.limit(spec["disk_mib"])
        kernel.drop_privileges(live.GRADER)
        kernel.die_with_parent()
        machine.serve_as_grader(channel, spec)
    except BaseException as error:  # noqa: BLE001 - as above
        with contextlib.suppress(OSError):
            channel.sendall(frame.failed(error))
    os._exit(0)
