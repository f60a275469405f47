"""How far a stage is: for the terminal, for MLflow, and for whoever looks into the folder."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from katcore.pipeline.plan import Plan, StageSpec

CURVE = "curve.jsonl"
WARNINGS = "warnings.txt"
_LOG = logging.getLogger(__name__)
_EVERY_S = 0.3
_TRACK_EVERY_S = 5.0
_PATIENCE = 10
"""So many times as long as MLflow took to fail, it is left alone: a database that is locked takes long."""


Show = Callable[[int, int, Mapping[str, float]], None]
"""Is told a step (from 0), how many there are, and the step's metrics."""


class Progress:
    """Reports of one running stage.

    `progress.json` holds the last state and is replaced whole. Numbers go to `out/curve.jsonl`, and in
    batches to an MLflow run that is opened with the first of them. While MLflow fails they wait: no training
    ends for it.
    """

    def __init__(
        self,
        spec: StageSpec,
        work: Path,
        plan: Plan,
        experiment: str = "",
        show: Show | None = None,
    ) -> None:
        own = f"expert/{spec.expert}" if spec.expert else "unified"
        self._experiment = experiment or own
        self._show = show
        self._spec = spec
        self._work = work
        self._plan = plan
        self._started_s = time.time()
        self._first_step: int | None = None
        self._written_s = 0.0
        self._track_at_s = time.time() + _TRACK_EVERY_S
        self._pending: list[tuple[int, dict[str, float]]] = []
        self._run: Any = None
        self._is_cut_off = False
        # Steps are told by the trainer's thread, restarts of servers by that of the engines.
        self._writing = threading.Lock()
        self.say("")

    def say(self, text: str) -> None:
        """A line of text, where there are no steps."""
        self._write({"text": text})

    def warn(self, text: str) -> None:
        """Something that a person should know: in the log, and noted beside the stage's state."""
        _LOG.warning(text)
        with (self._work / "out" / WARNINGS).open("a") as file:
            file.write(f"{text}\n")

    def step(self, step: int, steps: int, metrics: Mapping[str, float] | None = None) -> None:
        """Step `step` of `steps` (from 0) is done."""
        if self._show:
            self._show(step, steps, metrics or {})
        now = time.time()
        self._first_step = step if self._first_step is None else self._first_step
        if metrics:
            self._pending.append((step, dict(metrics)))
            with (self._work / "out" / CURVE).open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        if now - self._written_s > _EVERY_S or step + 1 == steps:
            done = step - self._first_step
            left_s = (now - self._started_s) / done * (steps - step - 1) if done else None
            self._write(
                {"step": step + 1, "steps": steps, "left_s": left_s, "metrics": dict(metrics or {})}
            )
        if self._pending and now > self._track_at_s:
            self._track()

    def close(self) -> None:
        """Send what is left to MLflow and end its run."""
        if self._pending:
            self._track()
        if self._run and not self._is_cut_off:
            self._told(self._run.end)

    def _track(self) -> None:
        started_s, wait_s = time.time(), _TRACK_EVERY_S
        if self._told(self._send):
            self._pending = []
        else:
            wait_s = max(wait_s, _PATIENCE * (time.time() - started_s))
        self._track_at_s = time.time() + wait_s

    def _told(self, call: Callable[[], None]) -> bool:
        """Whether MLflow took it; if not, that is said once until it does again."""
        try:
            call()
        except Exception as error:  # noqa: BLE001  its database, network or server: none is the training's
            if not self._is_cut_off:
                _LOG.warning(
                    "MLflow does not take the metrics of %s, which are in %s, too; they are sent again: %s",
                    self._spec.id,
                    CURVE,
                    error,
                )
            self._is_cut_off = True
            return False
        self._is_cut_off = False
        return True

    def _send(self) -> None:
        if self._run is None:
            tracking = import_module("katcore.registry.tracking")
            tags = {
                "katcore.stage": self._spec.id,
                "katcore.key": self._plan.keys[self._spec.id],
                "katcore.preset": self._plan.preset.name,
                "katcore.seed": str(self._plan.seed),
            }
            self._run = tracking.open_run(
                self._experiment, self._spec.id, tags, self._spec.config, self._work / "mlflow-run"
            )
        self._run.log(self._pending)

    def _write(self, state: Mapping[str, Any]) -> None:
        self._written_s = time.time()
        content = {
            "stage": self._spec.id,
            "pid": os.getpid(),
            "started_s": self._started_s,
            "updated_s": self._written_s,
            **state,
        }
        with self._writing:
            temporary = self._work / "progress.tmp"
            temporary.write_text(json.dumps(content))
            temporary.replace(self._work / "progress.json")


class Silent:
    """Stands for `Progress` where another process reports."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def step(self, step: int, steps: int, metrics: Mapping[str, float] | None = None) -> None:
        """Nothing."""
