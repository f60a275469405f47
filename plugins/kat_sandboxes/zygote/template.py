"""The process that sandboxes are forked from. It does next to nothing, so that they share its memory.

Memory is shared until one side writes to it, and Python writes to whatever it looks at. What this process
wrote to after a fork is no longer shared with that sandbox; what a sandbox writes to never was.
"""

import errno
import marshal
import os
import socket
import sys
from typing import Any

from kat_sandboxes.zygote import kernel, rehearsal, sandbox

_MAX_BYTES = 1 << 18
_NAMESPACES = kernel.NEW_NS | kernel.NEW_PID | kernel.NEW_UTS | kernel.NEW_IPC | kernel.NEW_NET


def start(private: socket.socket) -> socket.socket:
    """Fork it, without `private`. It is sent what `sandbox.run` takes, and the channel as a descriptor.

    It answers with the pid of the sandbox, a child of the calling process; or, below zero, an error's number.

    Raises:
        ChildProcessError: it has ended.
    """
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        mine.close()
        private.close()
        kernel.die_with_parent()
        rehearsal.rehearse()
        _serve(theirs)
        os._exit(0)
    theirs.close()
    with open(os.devnull) as file:
        for _ in range(rehearsal.TIMES):
            os.waitpid(fork(mine, None, file.fileno()), 0)
    return mine


def fork(template: socket.socket, spec: dict[str, Any] | None, channel: int) -> int:
    """The pid of a new sandbox; without a spec, of a process that ends at once.

    Raises:
        ChildProcessError: the template has ended.
        OSError: no process can be had.
    """
    try:
        socket.send_fds(template, [marshal.dumps(spec, 0)], [channel])
        answer = template.recv(16)
    except ConnectionError:
        answer = b""
    if not answer:
        raise ChildProcessError("the process that sandboxes are forked from has ended")
    pid = int(answer)
    if pid < 0:
        raise OSError(-pid, f"clone: {os.strerror(-pid)}")
    return pid


def _serve(requests: socket.socket) -> None:
    while True:
        data, found, _, _ = requests.recvmsg(_MAX_BYTES, socket.CMSG_SPACE(4))
        if not data:
            return
        channel = int.from_bytes(found[0][2], sys.byteorder)
        os.set_inheritable(channel, False)
        try:
            pid = kernel.fork_into(_NAMESPACES | kernel.SAME_PARENT)
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            os.close(requests.fileno())
            spec = marshal.loads(data)
            if spec is None:
                os._exit(0)
            sandbox.run(socket.socket(fileno=channel), spec)
        os.close(channel)
        requests.send(b"%d" % pid)
