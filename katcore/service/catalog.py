"""The services: what runs, with which environment, and how one sees that it is well."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from katcore.config import environment
from katcore.registry.location import artefact_root, tracking_uri
from katcore.service.layout import Layout
from katcore.service.port import HOST
from katcore.service.process import MARK

MIGRATE = "migrate"
"""The step that makes or upgrades Airflow's tables."""

_REAP = ("sandbox", "reap", "--every", "60")
_NOT_INHERITED = ("AIRFLOW", "_AIRFLOW", "MLFLOW_TRACKING", "MLFLOW_BACKEND")


@dataclass(frozen=True, slots=True)
class Service:
    """A process to keep running; one that `is_step` runs once, and those that need it wait for it.

    One without `has_health` is well as long as it runs.
    """

    name: str
    command: tuple[str, ...]
    needs: str = ""
    is_step: bool = False
    has_health: bool = True


def services(layout: Layout, mlflow_port: int) -> tuple[Service, ...]:
    """All services, in the order of their start.

    There is no triggerer, since nothing defers; and no log server, since the logs are on this machine.
    """

    def airflow(name: str, *arguments: str) -> Service:
        return Service(name, _python("airflow", *arguments), needs=MIGRATE)

    return (
        Service(
            "mlflow",
            _python(
                *("mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"),
                *("--backend-store-uri", tracking_uri(layout.home)),
                *("--default-artifact-root", artefact_root(layout.home).as_uri()),
                *("--artifacts-destination", artefact_root(layout.home).as_uri()),
            ),
        ),
        Service(MIGRATE, _python("airflow", "db", "migrate"), is_step=True),
        airflow("api-server", "api-server"),
        airflow("scheduler", "scheduler", "--skip-serve-logs"),
        airflow("dag-processor", "dag-processor"),
        Service("reaper", _python("katcore.cli", *_REAP), has_health=False),
    )


def service_environment(layout: Layout) -> dict[str, str]:
    """What all services inherit: settings of another Airflow or MLflow do not get through."""
    kept = {key: value for key, value in environment().items() if not _is_foreign(key)}
    near = ",".join(filter(None, (kept.get("NO_PROXY", kept.get("no_proxy")), HOST, "localhost")))
    return {"XDG_CACHE_HOME": str(layout.home / "cache"), **kept, **_own(layout, near)}


def _own(layout: Layout, near: str) -> Mapping[str, str]:
    return {
        MARK: str(layout.home),
        "KATCORE_HOME": str(layout.home),
        "AIRFLOW_HOME": str(layout.airflow),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "1",
        "NO_PROXY": near,
        "no_proxy": near,
        # Process titles would otherwise be written over the environment, and MARK with it.
        "SPT_NOENV": "1",
    }


def _is_foreign(key: str) -> bool:
    return key.startswith(_NOT_INHERITED)


def _python(*module_and_arguments: str) -> tuple[str, ...]:
    # -P: a folder named `airflow` where we start must not be taken for the package.
    return (sys.executable, "-P", "-m", *module_and_arguments)
