"""An image for tests, made of this machine's own programs: no network, and nothing of it is mounted."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

_PROGRAMS = (
    "awk base64 basename bash cat chmod chown chroot cp cut date dd dirname du echo env expr false"
    " find git git-upload-pack grep head id kill ln ls mkdir mkfifo mknod mktemp mount mv nohup od"
    " printf ps pwd readlink realpath rm rmdir sed seq setsid sh sha256sum sleep sort stat tail tar"
    " tee test timeout touch tr true umount uname uniq unshare wc xargs"
)
_FOLDERS = (
    "dev",
    "etc",
    "home",
    "agent",
    "proc",
    "root",
    "run",
    "srv",
    "sys",
    "tmp",
    "usr",
    "var/tmp",
)
_LEFT_OUT = {
    "test",
    "idlelib",
    "tkinter",
    "ensurepip",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "turtledemo",
}
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nagent:x:1000:1000:agent:/agent:/bin/sh\n"


def write(archive: Path) -> None:
    """Write it as a tar archive."""
    with tarfile.open(archive, "w") as tar:
        for name in _FOLDERS:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name.endswith("tmp") else 0o755
            entry.uid = entry.gid = 1000 if name == "agent" else 0
            tar.addfile(entry)
        for name in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{name}"):
                tar.add(f"/{name}", name)
        _text(tar, "etc/passwd", _PASSWD)
        _text(tar, "etc/group", "root:x:0:\nagent:x:1000:\n")
        found = [
            path
            for name in _PROGRAMS.split()
            if (path := shutil.which(name, path="/usr/bin:/bin:/usr/sbin"))
        ]
        python = os.path.realpath(sys.executable)
        for program in found:
            _file(tar, program, f"usr/bin/{os.path.basename(program)}")
        _file(tar, python, "usr/local/bin/python3")
        extensions = _library(tar)
        libraries = {_place(path): path for path in _needed([*found, python, *extensions])}
        for name, path in sorted(libraries.items()):
            _file(tar, path, name)


def _place(path: str) -> str:
    return f"{os.path.realpath(os.path.dirname(path))}/{os.path.basename(path)}"[1:]


def _library(tar: tarfile.TarFile) -> list[str]:
    """The standard library; returns its extension modules."""
    top = Path(os.__file__).parent
    extensions = []
    for folder, folders, names in os.walk(top):
        folders[:] = sorted(
            name for name in folders if name not in _LEFT_OUT and "config-" not in name
        )
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix in {".py", ".so"}:
                _file(tar, str(path), f"usr/local/lib/{top.name}/{path.relative_to(top)}")
            if path.suffix == ".so":
                extensions.append(str(path))
    return extensions


def _needed(files: list[str]) -> set[str]:
    """The libraries that they are linked with, and the loader."""
    said = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    return set(re.findall(r"(?:=> |\t)(/\S+) \(0x", said))


def _file(tar: tarfile.TarFile, path: str, name: str) -> None:
    entry = tar.gettarinfo(os.path.realpath(path), name)
    entry.type, entry.linkname = tarfile.REGTYPE, ""
    entry.uid = entry.gid = 0
    entry.mode = 0o755
    data = Path(path).read_bytes()
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _text(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text)
    tar.addfile(entry, io.BytesIO(text.encode()))
