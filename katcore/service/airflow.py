"""Airflow's REST API: log in, start a run of a DAG, follow it, cancel it."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from katcore.errors import ServiceError
from katcore.service import http
from katcore.service.layout import USER

FINAL = ("success", "failed")


class Airflow:
    """The API of one Airflow, as one user. Logs in again when the token is too old."""

    def __init__(self, url: str, password: str) -> None:
        self._url = url
        self._password = password
        self._token = ""

    def dag(self, dag_id: str) -> dict[str, Any] | None:
        """The DAG, or None if it has not been parsed yet.

        Raises:
            ServiceError: its file cannot be imported; says why.
        """
        try:
            found: dict[str, Any] = self._call("GET", f"/dags/{dag_id}")
        except http.RefusedError as error:
            if error.status != 404:
                raise
            broken = self._call("GET", "/importErrors")["import_errors"]
            if broken:
                last = broken[0]["stack_trace"].strip().splitlines()[-1]
                raise ServiceError(f"{broken[0]['filename']} cannot be imported: {last}") from error
            return None
        return found

    def unpause(self, dag_id: str) -> None:
        """Let runs of the DAG begin."""
        self._call("PATCH", f"/dags/{dag_id}", {"is_paused": False})

    def start(self, dag_id: str, conf: Mapping[str, Any]) -> str:
        """Start a run; returns its id."""
        body = {"logical_date": None, "conf": dict(conf)}
        run_id: str = self._call("POST", f"/dags/{dag_id}/dagRuns", body)["dag_run_id"]
        return run_id

    def unfinished(self, dag_id: str) -> list[str]:
        """The ids of runs that run or wait, oldest first."""
        path = f"/dags/{dag_id}/dagRuns?state=running&state=queued&order_by=id"
        return [run["dag_run_id"] for run in self._call("GET", path)["dag_runs"]]

    def state(self, dag_id: str, run_id: str) -> str:
        """The state of a run: queued, running, or one of FINAL."""
        found: str = self._call("GET", self._path(dag_id, run_id))["state"]
        return found

    def tasks(self, dag_id: str, run_id: str) -> dict[str, str]:
        """The state of each task of a run by its id."""
        path = f"{self._path(dag_id, run_id)}/taskInstances?limit=1000"
        found = self._call("GET", path)["task_instances"]
        return {task["task_id"]: task["state"] or "" for task in found}

    def cancel(self, dag_id: str, run_id: str) -> None:
        """Mark a run as failed; Airflow ends its tasks."""
        self._call("PATCH", self._path(dag_id, run_id), {"state": "failed"})

    def _path(self, dag_id: str, run_id: str) -> str:
        return f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}"

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        if not self._token:
            self._log_in()
        try:
            return http.call(method, f"{self._url}/api/v2{path}", body, token=self._token)
        except http.RefusedError as error:
            if error.status != 401:
                raise
            self._log_in()
            return http.call(method, f"{self._url}/api/v2{path}", body, token=self._token)

    def _log_in(self) -> None:
        body = {"username": USER, "password": self._password}
        self._token = http.call("POST", f"{self._url}/auth/token", body)["access_token"]
