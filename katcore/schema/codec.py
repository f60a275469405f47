"""Records to JSON and back, one line per record."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from katcore.errors import StageError

T = TypeVar("T")


@cache
def _adapter(record: Any) -> TypeAdapter[Any]:
    return TypeAdapter(record)


def to_json(record: object) -> bytes:
    """One record as compact JSON, without a line end."""
    kind: Any = type(record)
    return bytes(_adapter(kind).dump_json(record))


def from_json(record: type[T], data: bytes | str) -> T:
    """The record that `to_json` wrote.

    Raises:
        StageError: `data` is not a valid `record`.
    """
    try:
        kind: Any = record
        value: T = _adapter(kind).validate_json(data)
    except ValidationError as error:
        raise StageError(f"not a valid {record.__name__}: {error}") from error
    return value


def write_lines(path: Path, records: Iterable[object]) -> int:
    """Write one JSON line per record; returns how many."""
    num = 0
    with path.open("wb") as file:
        for record in records:
            file.write(to_json(record) + b"\n")
            num += 1
    return num


def read_lines(record: type[T], path: Path) -> Iterator[T]:
    """The records of a file that `write_lines` wrote, in order."""
    with path.open("rb") as file:
        for line in file:
            yield from_json(record, line)
