"""Files of rollouts: found, read, and put into other forms."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from katcore.errors import ConfigError, StageError
from katcore.plugin import Plugins
from katcore.schema.codec import from_json, to_json
from katcore.schema.rollout import Rollout
from katcore.trajectory.importer import IMPORTERS

ROLLOUTS = "rollouts.jsonl"
_SHOWN_CHARS = 300
_SHOWN_FILES = 5


def rollout_file(source: Path) -> Path:
    """The file of rollouts that `source` is or has.

    Raises:
        ConfigError: there is none; says what is there instead.
    """
    if source.is_file():
        return source
    if not source.exists():
        raise ConfigError(
            f"{source}: no such file or folder; give a {ROLLOUTS}, or a folder with one,"
            " such as .kat/stages/terminal.collect/*"
        )
    if (source / ROLLOUTS).is_file():
        return source / ROLLOUTS
    found = [
        *source.glob("*.jsonl"),
        *source.glob(f"*/{ROLLOUTS}"),
        *source.glob(f"*/*/{ROLLOUTS}"),
    ]
    names = ", ".join(str(path.relative_to(source)) for path in sorted(found)[:_SHOWN_FILES])
    said = f"it has {names}; give one of these" if names else "give a folder that a stage wrote"
    raise ConfigError(f"{source}: no {ROLLOUTS} in this folder; {said}")


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """The rollouts of a file, but for a last line that is still being written.

    Raises:
        StageError: another line is no rollout; names it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield from_json(Rollout, line)
            except StageError as error:
                if not line.endswith(b"\n"):
                    return
                said = " ".join(str(error).split())[:_SHOWN_CHARS]
                raise StageError(
                    f"{path}, line {number}: {said}; give a file of rollouts, one JSON line each"
                ) from error


def write_rows(target: Path, rows: Iterable[Any]) -> int:
    """Write records or plain rows, one line each, and say how many; the file appears when it is whole.

    `-` is the standard output.
    """
    if str(target) == "-":
        return _write(sys.stdout.buffer, rows)
    partial = target.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            count = _write(file, rows)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def format_rollouts(
    sources: Sequence[Path], name: str, options: dict[str, Any], out: Path | None, plugins: Plugins
) -> tuple[Path, int]:
    """The rows that a formatter makes of all rollouts of the sources; by default beside the first.

    Raises:
        ConfigError: a source holds no rollouts, or an option does not fit.
        PluginError: no such formatter.
        StageError: a line is no rollout, or one that this formatter refuses.
    """
    files = [rollout_file(source) for source in sources]
    formatter = plugins.make("formatter", name, options)
    target = out or files[0].with_name(f"{name}.jsonl")
    if target in files:
        raise ConfigError(f"{target} is what is to be read; give another file with --out")
    rollouts = (rollout for path in files for rollout in read_rollouts(path))
    return target, write_rows(target, formatter.samples(rollouts))


def import_sessions(kind: str, sources: Sequence[Path], out: Path) -> int:
    """Write what others recorded as one file of rollouts; says how many.

    Raises:
        ConfigError: nobody reads such files, or the target is there already.
        StageError: a file does not fit; says where.
    """
    if kind not in IMPORTERS:
        raise ConfigError(f"nothing reads {kind!r}; choose one of: {', '.join(IMPORTERS)}")
    if out.exists():
        raise ConfigError(f"{out} is there already; give another file with --out")
    return write_rows(out, (item for path in sources for item in IMPORTERS[kind](path)))


def _write(file: BinaryIO, rows: Iterable[Any]) -> int:
    count = 0
    for row in rows:
        file.write((to_json(row) if is_dataclass(row) else orjson.dumps(row)) + b"\n")
        count += 1
    return count
