"""A package becomes an image and a table of which test calls which function. Runs in the sandbox alone."""

import asyncio
import hashlib
import importlib.util
import json
import marshal
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_swe import source
from kat_swe.inside.shared import digest
from kat_swe.source import Package, Release
from katcore.config import home
from katcore.errors import TaskError
from katcore.protocols import Sandbox, SandboxBackend
from katcore.sandbox.image import ImageStore
from katcore.schema.task import SandboxSpec

INSIDE = Path(__file__).parent / "inside"
SCRIPTS = "/opt/swe/kat_swe/inside"
_IN_IMAGE = ("edit.py", "probe.py", "shared.py", "survey.py", "task.py", "trial.py")
_SURVEY_TIMEOUT_S = 300.0
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.c", "*.pyx", ".*")
_BATCH = 120


@dataclass(frozen=True, slots=True)
class Ingested:
    """A package in an image, and what its tests do.

    `tests` (those that run without fixtures) by key: how to run it, its seconds, which functions it calls.
    `files` are the digests of all files under /pkg.
    """

    package: Package
    image: str
    root: Path
    code: str
    tests: Mapping[str, dict[str, Any]]
    suite: Mapping[str, Any]
    files: Mapping[str, str]

    def modules(self) -> Iterator[tuple[str, str]]:
        """Path under /pkg and text of every module that is not a test."""
        for name in sorted(self.files):
            path = self.root / name
            if name.endswith(".py") and name.startswith(self.package.code) and "test" not in name:
                data = path.read_bytes()
                if b"\r" not in data and data.endswith(b"\n"):
                    yield name, data.decode(errors="replace")


class Ingester:
    """Makes images and runs suites and mutants; what it learnt is kept in katcore's home."""

    def __init__(self, backend: SandboxBackend, index: str) -> None:
        self._backend = backend
        self._index = index
        self._store = ImageStore(home() / "images")
        self._cache = home() / "swe"
        self._cache.mkdir(parents=True, exist_ok=True)

    def fetch(self, release: Release) -> Path:
        """The unpacked source of a release."""
        return source.fetch(release, self._cache, self._index)

    async def ingest(self, package: Package) -> Ingested:
        """Fetch, build and survey.

        Raises:
            TaskError: the source cannot be had, or its suite has no test that passes.
        """
        folder = await asyncio.to_thread(self.fetch, package.release)
        needs = [(await asyncio.to_thread(self.fetch, item)) / path for item, path in package.needs]
        with tempfile.TemporaryDirectory() as temporary:
            environment = _environment(package, folder, needs, Path(temporary))
            key = _content_key(environment)
            image = f"swe-{package.name}-{key[:12]}"
            root = self._cache / f"{image}.pkg"
            if not root.exists():
                shutil.copytree(environment / "pkg", root.with_suffix(".tmp"), dirs_exist_ok=True)
                root.with_suffix(".tmp").rename(root)
            if image not in self._store.names():
                self._store.build(image, environment)
        files = {
            str(path.relative_to(root)): digest(path.read_bytes())
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
        code = _import_root(package.code)
        survey = await self._survey(package, image, code)
        return Ingested(package, image, root, code, survey["tests"], survey["suite"], files)

    async def _survey(self, package: Package, image: str, code: str) -> dict[str, Any]:
        cache = self._cache / f"{image}.survey.json"
        if not cache.exists():
            async with self.machine(image) as sandbox:
                command = ["python3", f"{SCRIPTS}/survey.py", code, *package.tests]
                result = await sandbox.exec(command, timeout_s=_SURVEY_TIMEOUT_S)
                try:
                    found = await sandbox.read("/tmp/survey.json")
                except FileNotFoundError as error:
                    tail = (result.stdout + result.stderr)[-400:].decode(errors="replace")
                    raise TaskError(f"{package.name}: its suite does not run: {tail}") from error
            _write(cache, found)
        content: dict[str, Any] = json.loads(cache.read_bytes())
        if not content["tests"]:
            raise TaskError(
                f"{package.name} {package.release.version}: no test of its suite passes in the sandbox"
            )
        return content

    def machine(self, image: str) -> AbstractAsyncContextManager[Sandbox]:
        """A sandbox of an image."""
        folder = self._cache / f"{image}.env"
        folder.mkdir(exist_ok=True)
        dockerfile = folder / "Dockerfile"
        if not dockerfile.exists():
            dockerfile.write_text(f"FROM {image}\nWORKDIR /pkg\n")
        return self._backend.open(SandboxSpec(folder, memory_mib=1024))

    async def trials(self, image: str, mutants: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
        """What the tests of each mutant say, by mutant id; kept batch by batch."""
        found: dict[str, list[str]] = {}
        for first in range(0, len(mutants), _BATCH):
            batch = mutants[first : first + _BATCH]
            key = hashlib.sha256(json.dumps(batch).encode()).hexdigest()[:16]
            cache = self._cache / f"{image}.{key}.trials.json"
            if not cache.exists():
                _write(cache, json.dumps(await self._try(image, batch)).encode())
            found |= json.loads(cache.read_bytes())
        return found

    async def _try(self, image: str, mutants: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
        async with self.machine(image) as sandbox:
            await sandbox.write("/tmp/in.json", json.dumps(list(mutants)).encode())
            command = ["python3", f"{SCRIPTS}/trial.py", "/tmp/in.json", "/tmp/out.json"]
            result = await sandbox.exec(command, timeout_s=60.0 + 5 * len(mutants))
            try:
                found: dict[str, list[str]] = json.loads(await sandbox.read("/tmp/out.json"))
            except FileNotFoundError as error:
                tail = (result.stdout + result.stderr)[-400:].decode(errors="replace")
                raise TaskError(f"{image}: mutants cannot be tried: {tail}") from error
            return found


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_bytes(data)
    partial.replace(path)


def _import_root(code: str) -> str:
    """The folder under /pkg that has to be on the import path."""
    parent = str(Path(code).parent)
    return "" if parent == "." else parent


def _environment(package: Package, folder: Path, needs: Sequence[Path], out: Path) -> Path:
    """An environment folder: code, tests and compiled files under /pkg, our scripts under /opt/swe."""
    target = out / "pkg"
    tests = [name if "/" not in name else str(Path(name).parent) for name in package.tests]
    for name in sorted({package.code, *tests, "conftest.py"}):
        path = folder / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / name, dirs_exist_ok=True, ignore=_IGNORED)
        elif path.is_file():
            shutil.copyfile(path, target / name)
    for path in needs:
        shutil.copyfile(path, target / _import_root(package.code) / path.name)
    for path in sorted(target.rglob("*.py")):
        _compile(path)
    scripts = out / "swe" / "kat_swe" / "inside"
    scripts.mkdir(parents=True)
    for name in _IN_IMAGE:
        shutil.copyfile(INSIDE / name, scripts / name)
        _compile(scripts / name)
    tools = {"fix": f'python3 {SCRIPTS}/task.py fix "$@"', "t": f"python3 {SCRIPTS}/task.py t"}
    tools["show"] = "cat /opt/swe/shown"
    variables = " ".join(f"'BASH_FUNC_{name}%%=() {{ {body}; }}'" for name, body in tools.items())
    (out / "Dockerfile").write_text(
        f"FROM host\nCOPY pkg /pkg\nCOPY swe /opt/swe\nENV PYTHONPATH=/opt/swe {variables}\nWORKDIR /pkg\n"
    )
    return out


def _compile(path: Path) -> None:
    """Write the compiled file that Python looks for: the same bytes every time, checked by source hash."""
    data = path.read_bytes()
    relative = path.name
    try:
        code = compile(data, str(_place(path)), "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return
    head = (
        importlib.util.MAGIC_NUMBER + (3).to_bytes(4, "little") + importlib.util.source_hash(data)
    )
    cached = path.parent / "__pycache__" / cached_name(relative)
    cached.parent.mkdir(exist_ok=True)
    cached.write_bytes(head + marshal.dumps(code, 2))


def _place(path: Path) -> Path:
    """Where a file of an environment folder will be in the sandbox."""
    parts = path.parts
    if "pkg" in parts:
        return Path("/", *parts[parts.index("pkg") :])
    return Path(SCRIPTS, path.name)


def cached_name(name: str) -> str:
    """`edit.py` -> `edit.cpython-311.pyc`."""
    return f"{Path(name).stem}.{sys.implementation.cache_tag}.pyc"


def _content_key(folder: Path) -> str:
    content = hashlib.sha256(sys.version.encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return content.hexdigest()
