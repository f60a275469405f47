"""One sandbox: builds its root, gives up all privileges, then serves as its pid 1."""

import contextlib
import os
import socket
from typing import Any

from kat_sandboxes.zygote import files, frame, kernel, live, machine, warm

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
        # The server has a descriptor or two for each sandbox; here, all have to be ones that select(2) takes.
        low = channel.dup()
        channel.close()
        channel = low
        kernel.die_with_parent()
        os.setsid()
        socket.sethostname("sandbox")
        upper, lowers = build_root(spec)
        kernel.loopback_up()
        listener = socket.create_server(("127.0.0.1", warm.PORT), backlog=64)
        doors = machine.doors(spec)
        machine.limit(spec["disk_mib"])
        kernel.drop_privileges()
        machine.lock()
        root = files.Root(upper, lowers)
        python = warm.Python(listener, (channel, root), tuple(spec["interpreter"]))
        served = machine.Machine(channel, spec, lambda _: root.changes(), python)
        socket.send_fds(channel, [frame.pack({"ok": True})], [door.fileno() for door in doors])
        for door in doors:
            door.close()
        served.serve()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other end has to hear of it
        with contextlib.suppress(OSError):
            channel.sendall(frame.failed(error))
    os._exit(0)


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
