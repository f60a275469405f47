"""A Python for containers whatever is in their image: what the agent needs of this machine's, and no more.

The interpreter is started by its own loader with its own C library, so an image may have another one or none.
Which files that takes is not guessed: the interpreter imports the agent, and says what it has loaded.
"""

import compileall
import hashlib
import json
import os
import py_compile
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kat_sandboxes import host
from katcore.errors import SandboxUnavailableError
from katcore.sandbox.image import BUILDING

INSIDE = "/.kat/agent"
"""Where containers see it."""
_AGENT = "kat_sandboxes.docker.agent"
_SOURCE = Path(__file__).resolve().parents[2]
_LIST = """
import ctypes, json, os, sys
sys.path.insert(0, sys.argv[1])
for module in sys.argv[2:]:
    __import__(module)
files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
class Loaded(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]
libraries = set()
visit = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Loaded), ctypes.c_size_t, ctypes.c_void_p)
def note(loaded, size, data):
    libraries.add(os.fsdecode(loaded.contents.name))
    return 0
ctypes.CDLL(None).dl_iterate_phdr(visit(note), None)
json.dump([os.path.dirname(os.__file__), sorted(filter(None, files)), sorted(libraries)], sys.stdout)
"""
"""Libraries are listed by the names that others need them by: dl_iterate_phdr(3)."""


def command(folder: Path, channel: str) -> list[str]:
    """How a container starts the agent of a bundle."""
    return python(folder, _AGENT, "main", channel)


def python(folder: Path, module: str, function: str, *arguments: str) -> list[str]:
    """How a container calls a function of a module that is in a bundle."""
    loader = json.loads((folder / "loader.json").read_text())
    program = f"{INSIDE}/bin/{host.interpreter().name}"
    start = f"from {module} import {function}; {function}()"
    loaded = [f"{INSIDE}/lib/{loader}", "--library-path", f"{INSIDE}/lib", program]
    return [*loaded, "-I", "-S", "-B", "-X", "utf8", "-c", start, *arguments]


def make(parent: Path, mark: str, *modules: str) -> Path:
    """The bundle of this interpreter and these modules, the agent if none; made if it is not there.

    Raises:
        SandboxUnavailableError: the interpreter cannot be taken along.
    """
    library, files, libraries = _loaded(modules or (_AGENT,))
    target = parent / f"agent-{_hash([str(host.interpreter()), *files, *libraries])}"
    if target.exists():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{BUILDING}{mark}-") as temporary:
        folder = Path(temporary) / "agent"
        _write(folder, library, files, libraries)
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError:
            if not target.exists():
                raise
    return target


def _loaded(wanted: Sequence[str]) -> tuple[str, list[str], list[str]]:
    listed = subprocess.run(
        [str(host.interpreter()), "-I", "-S", "-c", _LIST, str(_SOURCE), *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise SandboxUnavailableError(
            f"{host.interpreter()} cannot run the agent of containers: {listed.stderr[-300:]}"
        )
    library, modules, libraries = json.loads(listed.stdout)
    codecs = [str(path) for path in sorted(Path(library, "encodings").glob("*.py"))]
    modules = sorted({*modules, *codecs, f"{library}/os.py"})
    known = {os.path.realpath(path) for path in modules}
    files = [item for item in libraries if "/" in item and os.path.realpath(item) not in known]
    return library, modules, files


def _hash(paths: list[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        found = os.stat(path)
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _write(folder: Path, library: str, modules: list[str], libraries: list[str]) -> None:
    (folder / "bin").mkdir(parents=True)
    shutil.copy(host.interpreter(), folder / "bin")
    inside = folder / "lib" / Path(library).name
    for path in modules:
        base = library if Path(path).is_relative_to(library) else _SOURCE
        target = inside / Path(path).relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for path in libraries:
        shutil.copy(path, folder / "lib")
    loader = next(Path(item).name for item in libraries if Path(item).name.startswith("ld-"))
    (folder / "loader.json").write_text(json.dumps(loader))
    compileall.compile_dir(
        inside, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
