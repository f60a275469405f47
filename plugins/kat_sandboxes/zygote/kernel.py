"""The system calls that Python has no function for."""

import ctypes
import fcntl
import os
import platform
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_IS_ARM = platform.machine() == "aarch64"
_CLONE, _PIVOT_ROOT, _CAPSET, _SECCOMP = (220, 41, 91, 277) if _IS_ARM else (56, 155, 126, 317)
_PIDFD_OPEN, _PIDFD_GETFD = 434, 438

NEW_NS = 0x20000
NEW_UTS = 0x4000000
NEW_IPC = 0x8000000
NEW_USER = 0x10000000
NEW_PID = 0x20000000
NEW_NET = 0x40000000
SAME_ROOT = 0x200
SAME_FILES = 0x400
SAME_PARENT = 0x8000

READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT, BIND, RECURSIVE = 1, 2, 4, 8, 32, 4096, 16384
PRIVATE = 1 << 18
_DETACH = 2
_SIGCHLD = 17


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system, as mount of section 2 of the manual."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"mount {source} on {target}")


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Show a file or folder at a second place."""
    mount(source, target, flags=BIND | RECURSIVE)
    if read_only:
        mount("none", target, flags=BIND | REMOUNT | READ_ONLY | NO_SUID)


def enter_root(folder: str) -> None:
    """Make `folder` (a mount point) the root, and detach the old one: pivot_root(2)."""
    os.chdir(folder)
    _check(_libc.syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")


def unshare(flags: int) -> None:
    """Leave the namespaces shared with the parent."""
    _check(_libc.unshare(flags), "unshare")


def fork_into(flags: int) -> int:
    """fork(2) into new namespaces: clone(2) without a stack.

    For a process with one thread. Python is not told of it: its hooks would write to 0.4 MiB of memory that
    parent and child share otherwise. They run when the child forks with `os.fork`.
    """
    pid: int = _libc.syscall(_CLONE, ctypes.c_ulong(flags | _SIGCHLD), 0, 0, 0, 0)
    return _check(pid, "clone")


def loopback_up() -> None:
    """Bring up `lo` in a fresh network namespace."""
    with socket.socket() as probe:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))


def become_subreaper() -> None:
    """Orphans of this process's tree become its children."""
    _libc.prctl(36, 1, 0, 0, 0)


def die_with_parent() -> None:
    """SIGKILL when the parent goes."""
    _libc.prctl(1, 9, 0, 0, 0)


def set_dumpable(*, is_dumpable: bool) -> None:
    """Whether other processes of the same user may look into this one."""
    _libc.prctl(4, int(is_dumpable), 0, 0, 0)


def enter_namespaces(pid: int, flags: int) -> None:
    """Those of another process: setns(2). Of its pid namespace are only the children from then on."""
    process = _check(_libc.syscall(_PIDFD_OPEN, pid, 0), "pidfd_open")
    try:
        _check(_libc.setns(process, flags), "setns")
    finally:
        os.close(process)


def drop_privileges(user: int = 0) -> None:
    """No capability now or by exec, ever again; as another user, if one is given."""
    for capability in range(64):
        _libc.prctl(24, capability, 0, 0, 0)
    _libc.prctl(47, 4, 0, 0, 0)
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = struct.pack("II", 0x20080522, 0)
    _check(_libc.syscall(_CAPSET, header, bytes(24)), "capset")
    _check(_libc.prctl(38, 1, 0, 0, 0), "no_new_privs")


def borrow_descriptor(pid: int, number: int) -> int:
    """A copy of another process's open file description: pidfd_getfd(2)."""
    holder = _check(_libc.syscall(_PIDFD_OPEN, pid, 0), "pidfd_open")
    try:
        return _check(_libc.syscall(_PIDFD_GETFD, holder, number, 0), "pidfd_getfd")
    finally:
        os.close(holder)


def install_filter(program: bytes) -> None:
    """Install a seccomp filter; it holds for all descendants."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _check(_libc.syscall(_SECCOMP, 1, 0, header), "seccomp")
