"""`kat audit`: proof of a sample file from its call log, one session at a time.

Both files are read through once to find where each session's lines are; then each session is read, proven
and forgotten. The memory that is needed is that of the largest session, and the places of all lines.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.table import Table

from katcore.errors import StageError
from katcore.pipeline.recorded import ROLLOUTS
from katcore.schema.call import ModelCall
from katcore.schema.codec import T, from_json
from katcore.schema.sample import Sample
from katcore.trajectory.audit import audit_samples


@dataclass(frozen=True, slots=True)
class Found:
    """What was proven, and what the log says of the calls.

    `num_flagged` rollouts, of those in a `rollouts.jsonl` beside the samples, have a flag of cheating.
    `num_forks` counts calls that left the conversation they continued before its end. `violation` is the
    first training token that the log does not bear out, "" if there is none.
    """

    num_samples: int = 0
    num_trained_tokens: int = 0
    num_sessions: int = 0
    num_calls: int = 0
    num_exact: int = 0
    num_retokenised: int = 0
    num_forks: int = 0
    num_flagged: int = 0
    num_violations: int = 0
    violation: str = ""

    @property
    def exact_fraction(self) -> float | None:
        """The share of calls in whose prompts all answers stand by the ids in which they were given."""
        return self.num_exact / self.num_calls if self.num_calls else None


_SAMPLES = ("samples.jsonl", "tree.jsonl", "rl_tree.jsonl", "distill_tree.jsonl", "sft_tree.jsonl")
"""What stages and the tree formatters of collections call their files."""


def files_of(path: Path | None, calls: Path | None, samples: Path | None) -> tuple[Path, Path]:
    """The call log and the sample file, by folder or by name.

    Raises:
        StageError: one is not named, or not there.
    """
    found: list[Path] = []
    if path and not samples:
        samples = next((path / name for name in _SAMPLES if (path / name).is_file()), None)
    for given, name in ((calls, "calls.jsonl"), (samples, "samples.jsonl")):
        file = given or (path / name if path else None)
        if file is None:
            raise StageError(
                f"no {name} to audit; name the folder of a finished stage, or both files with"
                " --calls and --samples"
            )
        if not file.is_file():
            raise StageError(
                f"{file}: no such file; a folder to audit holds calls.jsonl and samples.jsonl"
            )
        found.append(file)
    return found[0], found[1]


def audit_files(calls: Path, samples: Path) -> Found:
    """Prove every trained token of `samples` from `calls`, and that no flagged rollout was rewarded.

    Raises:
        StageError: a line is no record of its kind; names the file and the line.
    """
    log = _Lines(calls, "session_id", may_be_torn=True)
    rows = _Lines(samples, "rollout_id", may_be_torn=False)
    flagged = _flagged(samples.with_name(ROLLOUTS))
    total = Found(num_sessions=len(log.places), num_flagged=len(flagged))
    for name in dict.fromkeys((*rows.places, *log.places)):
        made = list(log.read(ModelCall, name))
        audit = audit_samples(rows.read(Sample, name), {name: made})
        problems = list(audit.problems)
        if name in flagged and any(sample.reward for sample in rows.read(Sample, name)):
            problems.append(f"{name}: it was rewarded, though it is flagged: {flagged[name]}")
        total = Found(
            total.num_samples + audit.num_samples,
            total.num_trained_tokens + audit.num_trained_tokens,
            total.num_sessions,
            total.num_calls + len(made),
            total.num_exact + sum(call.is_exact for call in made),
            total.num_retokenised + sum(call.num_retokenised for call in made),
            total.num_forks + _num_forks(made),
            total.num_flagged,
            total.num_violations + len(problems),
            total.violation or next(iter(problems), ""),
        )
    return total


def as_json(found: Found) -> dict[str, Any]:
    """All numbers, for machines."""
    return {**asdict(found), "exact_fraction": found.exact_fraction}


def as_table(found: Found) -> Table:
    """All numbers, for people."""
    exact = found.exact_fraction
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    for what, count in (
        ("samples", f"{found.num_samples:,}"),
        ("trained tokens", f"{found.num_trained_tokens:,}"),
        ("sessions", f"{found.num_sessions:,}"),
        ("calls", f"{found.num_calls:,}"),
        ("exact prompts", "none" if exact is None else f"{exact:.2%}"),
        ("retokenised answers", f"{found.num_retokenised:,}"),
        ("forks", f"{found.num_forks:,}"),
        ("flagged rollouts", f"{found.num_flagged:,}"),
        ("violations", f"{found.num_violations:,}"),
    ):
        table.add_row(what, count)
    return table


class _Lines:
    """Where the lines of a file are, by one field of the records on them."""

    def __init__(self, path: Path, field: str, *, may_be_torn: bool) -> None:
        self._path = path
        self.places: dict[str, list[tuple[int, int]]] = {}
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                is_whole = line.endswith(b"\n") or not may_be_torn
                if is_whole and (name := self._name(line, field, number)) is not None:
                    self.places.setdefault(name, []).append((offset, number))
                offset += len(line)

    def read(self, kind: type[T], name: str) -> Iterator[T]:
        """The records of one name, in order."""
        with self._path.open("rb") as file:
            for offset, number in self.places.get(name, ()):
                file.seek(offset)
                try:
                    yield from_json(kind, file.readline())
                except StageError as error:
                    raise StageError(f"{self._path}, line {number}: {error}") from error

    def _name(self, line: bytes, field: str, number: int) -> str | None:
        """The name on a line; None for a request that got no answer."""
        try:
            record = orjson.loads(line)
            if "failure" in record:
                return None
            return str(record[field])
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"{self._path}, line {number}: not a record with {field!r}: {error}"
            ) from error


def _flagged(path: Path) -> dict[str, str]:
    """What the flagged rollouts of a file are flagged with, by their ids; of nothing if there is no file."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        rollouts = (orjson.loads(line) for line in file if line.endswith(b"\n"))
        return {
            str(item["id"]): str(item["verdict"]["flags"][0]["detail"])
            for item in rollouts
            if item["verdict"].get("flags")
        }


def _num_forks(calls: list[ModelCall]) -> int:
    lengths = {call.call_id: call.num_ids for call in calls}
    return sum(call.num_shared < lengths.get(call.parent, 0) for call in calls)
