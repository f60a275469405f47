"""The system calls that sandboxed code cannot make: a deny list, as classic BPF.

Modelled on what container engines block: mounting, namespaces, tracing, kernel modules, keys, bpf, time and
reboot. `clone3` answers ENOSYS, so that the C library falls back to `clone`, whose flags can be read. Sockets
are those that a network namespace holds: a VSOCK one would reach the hypervisor from any.
"""

import errno
import platform
import socket
import struct

_X86 = (0xC000003E, 56, 16, 435, 41)
_ARM = (0xC00000B7, 220, 29, 435, 198)
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_NEW_NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
_TERMINAL_INJECTION = (0x5412, 0x541C)

# On both machines: the calls added since the tables were unified.
_DENIED_BOTH = (425, 426, 427, 428, 429, 430, 431, 432, 433, 442, 443, 447, 450, 467)
_DENIED_X86 = (
    101, 103, 134, 135, 139, 153, 154, 155, 156, 159, 161, 163, 164, 165, 166, 167, 168, 169, 172, 173, 174,
    175, 176, 177, 178, 179, 180, 212, 227, 237, 238, 239, 246, 248, 249, 250, 256, 272, 279, 298, 303, 304,
    305, 308, 310, 311, 312, 313, 320, 321, 323,
)  # fmt: skip
_DENIED_ARM = (
    18, 39, 40, 41, 42, 51, 58, 60, 89, 92, 97, 104, 105, 106, 112, 116, 117, 142, 170, 171, 217, 218, 219,
    224, 225, 235, 236, 237, 238, 239, 241, 264, 265, 266, 268, 270, 271, 272, 273, 280, 282, 294,
)  # fmt: skip

_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000


def _load(offset: int) -> bytes:
    return struct.pack("HBBI", 0x20, 0, 0, offset)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _answer(value: int) -> bytes:
    return struct.pack("HBBI", 0x06, 0, 0, value)


def program() -> bytes:
    """The filter for this machine."""
    is_arm = platform.machine() == "aarch64"
    arch, clone, ioctl, clone3, make_socket = _ARM if is_arm else _X86
    equal, at_least, any_bit = 0x15, 0x35, 0x45
    code = [
        _load(4), _jump(equal, arch, 1, 0), _answer(_KILL),
        _load(0), _jump(at_least, 0x40000000, 0, 1), _answer(_ERROR | errno.EPERM),
        _jump(equal, clone3, 0, 1), _answer(_ERROR | errno.ENOSYS),
        _jump(equal, clone, 0, 4), _load(16), _jump(any_bit, _NEW_NAMESPACES, 0, 1),
        _answer(_ERROR | errno.EPERM), _answer(_ALLOW),
        _jump(equal, ioctl, 0, 5), _load(24), _jump(equal, _TERMINAL_INJECTION[0], 1, 0),
        _jump(equal, _TERMINAL_INJECTION[1], 0, 1), _answer(_ERROR | errno.EPERM), _answer(_ALLOW),
        _jump(equal, make_socket, 0, len(_FAMILIES) + 3), _load(16),
    ]  # fmt: skip
    for left, family in zip(reversed(range(len(_FAMILIES))), _FAMILIES, strict=True):
        code.append(_jump(equal, family, left + 1, 0))
    code += [_answer(_ERROR | errno.EAFNOSUPPORT), _answer(_ALLOW)]
    denied = (*_DENIED_BOTH, *(_DENIED_ARM if is_arm else _DENIED_X86))
    for number in denied:
        code += [_jump(equal, number, 0, 1), _answer(_ERROR | errno.EPERM)]
    return b"".join([*code, _answer(_ALLOW)])
