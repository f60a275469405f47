"""Stages as MLflow runs: parameters once, metrics in batches."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param

from katcore.registry.store import client, experiment_id

_MAX_VALUE = 500


class Run:
    """An open MLflow run."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def log(self, steps: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log the metrics of several steps in one write."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, step)
            for step, values in steps
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), 900):
            client().log_batch(self.run_id, metrics=metrics[start : start + 900])

    def end(self) -> None:
        """Mark the run as finished."""
        client().set_terminated(self.run_id)


def open_run(
    experiment: str, name: str, tags: Mapping[str, str], config: Mapping[str, Any], memory: Path
) -> Run:
    """Open a run, or the one noted in the file `memory` by a stage that was interrupted."""
    if memory.exists():
        return Run(memory.read_text())
    run = client().create_run(experiment_id(experiment), run_name=name, tags=dict(tags))
    run_id = str(run.info.run_id)
    params = [Param(key, value[:_MAX_VALUE]) for key, value in _flat(config)]
    client().log_batch(run_id, params=params)
    memory.write_text(run_id)
    return Run(run_id)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
