"""Where MLflow keeps its data: one SQLite file and one artefact folder in katcore's home."""

import fcntl
import logging
import os
from functools import cache
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

from katcore.config import home
from katcore.registry.location import artefact_root, tracking_uri


def client() -> MlflowClient:
    """A client of the store in katcore's home. The first one makes the database, one process at a time."""
    return _client(home())


@cache
def _client(root: Path) -> MlflowClient:
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(tracking_uri(root))
    with (root / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = MlflowClient(tracking_uri(root))
        found.search_experiments(max_results=1)
    return found


def experiment_id(name: str) -> str:
    """The id of an experiment, made now if it is new."""
    store, root = client(), home()
    with (root / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = store.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        folder = artefact_root(root) / name.replace("/", "-")
        return str(store.create_experiment(name, artifact_location=folder.as_uri()))
