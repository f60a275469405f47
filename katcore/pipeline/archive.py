"""The archive of a collection: its config and its segments, under a root that outlives this machine.

Each rollout is kept as it ends. Whoever runs the same collection elsewhere goes on where it stopped.
"""

import json
from pathlib import Path

from katcore.errors import ConfigError, StageError
from katcore.schema.codec import read_lines, to_json
from katcore.schema.rollout import Rollout
from katcore.trajectory.calls import drop_torn_line
from katcore.trajectory.segments import CallLines, Segments


class Archive:
    """Of one collection's folder; without a root it keeps nothing. Nothing is written before `restore`."""

    def __init__(self, folder: Path, root: str) -> None:
        self._segments = Segments(f"{root.rstrip('/')}/{folder.name}") if root else None
        self._calls = folder / "calls.jsonl"
        self._rollouts = folder / "rollouts.jsonl"
        self._config = folder / "config.json"
        self._lines = CallLines(self._calls)
        self._problem = ""

    def restore(self) -> int:
        """Take what the folder lacks from the archive, and the other way round; returns how many were taken.

        Call it before the log is open.

        Raises:
            ConfigError: the archive is of a collection of another config.
            StageError: the archive cannot be read or written.
        """
        if not self._segments:
            return 0
        self._check_config(self._segments)
        for path in (self._calls, self._rollouts):
            path.touch()
            drop_torn_line(path)
        here = {item.id for item in read_lines(Rollout, self._rollouts)}
        there = set(self._segments.names())
        for item in read_lines(Rollout, self._rollouts):
            if item.id not in there:
                self._write(self._segments, item)
        logged = self._lines.sessions()
        missing = sorted(there - here)
        with self._calls.open("ab") as calls, self._rollouts.open("ab") as rollouts:
            for name in missing:
                lines, rollout = self._segments.read(name)
                if name not in logged:
                    calls.write(lines)
                rollouts.write(rollout)
        return len(missing)

    def keep(self, rollout: Rollout) -> None:
        """Keep one more; what is not taken, `check` tells, and the next `restore` makes up for."""
        if not self._segments:
            return
        try:
            self._write(self._segments, rollout)
        except StageError as error:
            self._problem = self._problem or str(error)

    def check(self) -> None:
        """Raise StageError if something was not kept."""
        if self._problem:
            raise StageError(
                f"{self._problem}; all rollouts are here, the same command keeps them there, too"
            )

    def _check_config(self, segments: Segments) -> None:
        """The tasks may lie elsewhere on another machine; all else has to be the same."""
        own = self._config.read_bytes()
        here, there = (json.loads(text) | {"tasks": ""} for text in (own, segments.config(own)))
        if here != there:
            names = ", ".join(sorted(key for key in here if here[key] != there.get(key)))
            raise ConfigError(
                f"{segments.root} was made with another config ({names}); choose another --name, or"
                " other artifacts"
            )

    def _write(self, segments: Segments, rollout: Rollout) -> None:
        segments.write(rollout.id, self._lines.take(rollout.id), to_json(rollout))
