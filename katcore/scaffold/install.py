"""Scaffolds are installed once, into a folder that sandboxes are shown read-only."""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from katcore.errors import ScaffoldError

_TIMEOUT_S = 1800.0
_FLAGS = ("--no-audit", "--no-fund", "--loglevel=error")
_PYTHON = "3.11"
_LAUNCHER = """\
\"\"\"Runs a module with packages that nothing it starts will see: `run.py MODULE ARGUMENTS`.\"\"\"

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "python"))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

_Report = Callable[[str], None]


async def install_npm(root: Path, name: str, packages: Mapping[str, str], report: _Report) -> Path:
    """The folder in `root` that has these packages (name to exact version); made if it is not there.

    The first package is what `name` stands for. A `node` among them comes first, and installs the others:
    npm silently takes an older release of a package that wants a newer node.

    Raises:
        ScaffoldError: npm is missing or fails, or another version came than was asked for.
    """
    return await asyncio.to_thread(_once, root, name, dict(packages), _fill_npm, report)


async def install_pypi(root: Path, name: str, packages: Mapping[str, str], report: _Report) -> Path:
    """The same with packages of PyPI, for the `python3` of a sandbox that is Python 3.11.

    `run.py MODULE ...` in the folder runs one of their modules. Only wheels are taken: nothing of the
    packages runs on this machine.

    Raises:
        ScaffoldError: pip fails, or has no wheel.
    """
    return await asyncio.to_thread(_once, root, name, dict(packages), _fill_pypi, report)


def _once(
    root: Path,
    name: str,
    packages: dict[str, str],
    fill: Callable[[Path, dict[str, str], _Report], None],
    report: _Report,
) -> Path:
    key = hashlib.sha256(json.dumps(packages).encode()).hexdigest()[:8]
    target = root / f"{name}-{next(iter(packages.values()))}-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{target.name}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=root, prefix="installing-") as temporary:
                folder = Path(temporary) / name
                folder.mkdir()
                fill(folder, packages, report)
                folder.rename(target)
    return target


def _fill_npm(folder: Path, packages: dict[str, str], report: _Report) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ScaffoldError(
            f"{folder.name} is an npm package, and there is no npm; install Node.js 20 or later"
        )
    own_node = {key: at for key, at in packages.items() if key == "node"}
    others = {key: at for key, at in packages.items() if key != "node"}
    path = f"{folder}/node_modules/.bin:{os.environ.get('PATH', '')}"
    for chosen in filter(None, (own_node, others)):
        report(_installing(chosen))
        wanted = [f"{package}@{version}" for package, version in chosen.items()]
        _run([npm, "install", *_FLAGS, "--prefix", str(folder), *wanted], wanted, PATH=path)
    for package, version in packages.items():
        found = json.loads((folder / "node_modules" / package / "package.json").read_text())
        if found["version"] != version:
            raise ScaffoldError(
                f"npm installed {package} {found['version']} where {version} was asked for"
            )


def _fill_pypi(folder: Path, packages: dict[str, str], report: _Report) -> None:
    report(_installing(packages))
    wanted = [f"{package}=={version}" for package, version in packages.items()]
    beside = str(Path(sys.executable).parent)
    uv = shutil.which("uv", path=f"{beside}:{os.environ.get('PATH', '')}")
    pip = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    flags = ["--target", f"{folder}/python", "--python-version", _PYTHON, "--only-binary", ":all:"]
    _run([*pip, "install", *flags, *wanted], wanted)
    (folder / "run.py").write_text(_LAUNCHER)


def _installing(packages: Mapping[str, str]) -> str:
    return f"installing {' '.join(f'{key} {at}' for key, at in packages.items())}"


def _run(command: list[str], wanted: list[str], **env: str) -> None:
    tool = Path(command[0]).name
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            env={**os.environ, **env},
        )
    except subprocess.TimeoutExpired as error:
        raise ScaffoldError(f"{tool} did not install {wanted} within {_TIMEOUT_S:g} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-500:]
        raise ScaffoldError(f"{tool} could not install {' '.join(wanted)}: {said}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
