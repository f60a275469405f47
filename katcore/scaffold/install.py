"""Scaffolds are installed once, into a folder that sandboxes are shown read-only."""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from katcore.errors import ScaffoldError

_TIMEOUT_S = 1800.0
_FLAGS = ("--no-audit", "--no-fund", "--loglevel=error")


async def install_npm(
    root: Path, name: str, packages: Mapping[str, str], report: Callable[[str], None]
) -> Path:
    """The folder in `root` that has these packages (name to exact version); made if it is not there.

    The first package is what `name` stands for. A `node` among them comes first, and installs the others:
    npm silently takes an older release of a package that wants a newer node.

    Raises:
        ScaffoldError: npm is missing or fails, or another version came than was asked for.
    """
    return await asyncio.to_thread(_install, root, name, dict(packages), report)


def _install(
    root: Path, name: str, packages: dict[str, str], report: Callable[[str], None]
) -> Path:
    key = hashlib.sha256(json.dumps(packages).encode()).hexdigest()[:8]
    target = root / f"{name}-{next(iter(packages.values()))}-{key}"
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{target.name}.lock"):
        if target.exists():
            return target
        npm = shutil.which("npm")
        if npm is None:
            raise ScaffoldError(
                f"{name} is an npm package, and there is no npm; install Node.js 20 or later"
            )
        with tempfile.TemporaryDirectory(dir=root, prefix="installing-") as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            own_node = {key: packages.pop(key) for key in ("node",) if key in packages}
            for chosen in (own_node, packages):
                if chosen:
                    report(f"installing {' '.join(f'{key} {at}' for key, at in chosen.items())}")
                    _npm(npm, folder, chosen)
            for package, version in (own_node | packages).items():
                _check(folder, package, version)
            folder.rename(target)
    return target


def _npm(npm: str, folder: Path, packages: Mapping[str, str]) -> None:
    wanted = [f"{package}@{version}" for package, version in packages.items()]
    path = f"{folder}/node_modules/.bin:{os.environ.get('PATH', '')}"
    try:
        subprocess.run(
            [npm, "install", *_FLAGS, "--prefix", str(folder), *wanted],
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            env={**os.environ, "PATH": path},
        )
    except subprocess.TimeoutExpired as error:
        raise ScaffoldError(f"npm did not install {wanted} within {_TIMEOUT_S:g} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-500:]
        raise ScaffoldError(f"npm could not install {' '.join(wanted)}: {said}") from error


def _check(folder: Path, package: str, version: str) -> None:
    found = json.loads((folder / "node_modules" / package / "package.json").read_text())["version"]
    if found != version:
        raise ScaffoldError(f"npm installed {package} {found} where {version} was asked for")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
