"""What every sandbox shares with the machine: its programs and interpreter, read-only, and a small /etc."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from kat_sandboxes.zygote import warm
from katcore.sandbox.image import BUILDING

TOOLS = "/opt/kat"
_TEST_PACKAGES = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
_FOLDERS = (
    "dev", "etc", "home", "logs/verifier", "opt/kat", "opt/scaffold", "proc", "root", "run", "stage", "tests",
    "tmp", "usr", "var/tmp",
)  # fmt: skip
_COPIED = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "mime.types", "localtime")
_WRITTEN = {
    "ld.so.preload": "",
    "passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
    "group": "root:x:0:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "gitconfig": (
        "[user]\n\tname = Agent\n\temail = agent@sandbox\n[safe]\n\tdirectory = *\n"
        "[init]\n\tdefaultBranch = main\n[gc]\n\tauto = 0\n[core]\n\tpager = cat\n"
    ),
}


def interpreter() -> Path:
    """The machine's Python, outside any virtual environment."""
    return Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"


def import_path() -> list[str]:
    """sys.path of sandboxed Python: the standard library and the test packages."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    library = f"{sys.base_prefix}/lib/python{version}"
    return [library, f"{library}/lib-dynload", f"{TOOLS}/lib"]


def shared_folders() -> list[str]:
    """Folders of the machine that sandboxes see, in mount order; symlinks are kept as links."""
    folders = ["/usr", *(f"/{name}" for name in _top_level() if not os.path.islink(f"/{name}"))]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        folders.append(sys.base_prefix)
    return folders


def links() -> dict[str, str]:
    """Top-level symlinks such as /bin -> usr/bin."""
    return {
        f"/{name}": os.readlink(f"/{name}") for name in _top_level() if os.path.islink(f"/{name}")
    }


def masked_folders() -> list[str]:
    """Installed Python packages of the machine: they may hold what a task asks for."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    candidates = (
        f"{sys.base_prefix}/lib/{version}/site-packages",
        "/usr/lib/python3/dist-packages",
        f"/usr/local/lib/{version}/dist-packages",
        f"/usr/local/lib/{version}/site-packages",
    )
    return [folder for folder in dict.fromkeys(candidates) if os.path.isdir(folder)]


def base_layer(images: Path, mark: str) -> Path:
    """The lowest layer of all images: folders, links and a minimal /etc. Made if it is not there."""
    content = json.dumps([_FOLDERS, _WRITTEN, links(), shared_folders(), masked_folders()])
    return _once(images, f"layers/host-{_hash(content)}", mark, _write_base)


def root_layer(images: Path, mark: str) -> Path:
    """The lowest layer of images with programs of their own: places to mount at, and what they may lack."""
    content = json.dumps([_FOLDERS, _WRITTEN])
    return _once(images, f"layers/root-{_hash(content)}", mark, _write_root)


def tools(images: Path, mark: str) -> Path:
    """The folder that sandboxes see as /opt/kat: the warm `python3`, and pytest. Made if it is not there."""
    versions = [metadata.version(name) for name in _TEST_PACKAGES]
    content = json.dumps([versions, warm.CLIENT, str(interpreter())])
    return _once(images, f"tools/tools-{_hash(content)}", mark, _write_tools)


def _top_level() -> list[str]:
    return [
        name for name in ("bin", "sbin", "lib", "lib32", "lib64") if os.path.lexists(f"/{name}")
    ]


def _hash(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _once(images: Path, name: str, mark: str, write: Callable[[Path], None]) -> Path:
    target = images / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=images, prefix=f"{BUILDING}{mark}-") as temporary:
            folder = Path(temporary) / "layer"
            folder.mkdir(mode=0o755)
            write(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.exists():
                    raise
    return target


def _write_root(folder: Path) -> None:
    for name in _FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (folder / name).chmod(0o1777)
    for name, text in _WRITTEN.items():
        (folder / "etc" / name).write_text(text)


def _write_base(folder: Path) -> None:
    _write_root(folder)
    for path in shared_folders():
        (folder / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for link, target in links().items():
        (folder / link.lstrip("/")).symlink_to(target)
    for name in _COPIED:
        source, target_path = Path("/etc") / name, folder / "etc" / name
        if source.is_dir():
            shutil.copytree(source, target_path, symlinks=True)
        elif source.exists():
            shutil.copy2(source, target_path)


def _write_tools(folder: Path) -> None:
    (folder / "bin").mkdir()
    real = str(interpreter())
    for name in ("python", "python3"):
        path = folder / "bin" / name
        path.write_text(warm.CLIENT % (real, real))
        path.chmod(0o755)
    (folder / "empty").mkdir()
    for package in _TEST_PACKAGES:
        for file in metadata.files(package) or ():
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            target = folder / "lib" / str(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)
