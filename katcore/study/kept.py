"""The runs of a study on disk, each as it ends: a study that was stopped goes on with those that are left."""

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from katcore.pipeline import document
from katcore.pipeline.plan import code_hash
from katcore.schema.codec import from_json, to_json
from katcore.study.race import Entry, Run

_CODE = ("train", "inference", "schema", "study", "pipeline.learner", "pipeline.prefill")


class Kept:
    """Those that the same code made with the same `settings`. Others stay where they are and are not read.

    Processes that make different runs may share the folder.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        made_by = [code_hash(f"katcore.{name}") for name in _CODE]
        self._key = hashlib.sha256(repr((made_by, settings)).encode()).hexdigest()[:16]

    def read(self, entry: Entry) -> Run | None:
        """The run, if it was made."""
        path = self._path(entry)
        return from_json(Run, path.read_bytes()) if path.is_file() else None

    def write(self, run: Run) -> None:
        """Keep it."""
        document.write(self._path(run.entry), to_json(run).decode())

    def _path(self, entry: Entry) -> Path:
        name = re.sub(r"\W+", "-", " ".join(map(str, asdict(entry).values())))
        return self._folder / f"{name}.{self._key}.json"
