"""The process that starts the services and watches them: `python -m katcore.service.supervisor PORT PORT`.

It starts again what dies, a few times; then it gives up, says which, and ends them all. A service ends with
it even if it is killed; what a service leaves is found by its mark.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from katcore.config import home
from katcore.errors import KatError
from katcore.pipeline.parent import die_with_parent
from katcore.service import http, process, state
from katcore.service.catalog import MIGRATE, Service, service_environment, services
from katcore.service.layout import Layout

_MAX_RESTARTS = 3
_POLL_S = 0.5
_MAX_LOG_BYTES = 8 << 20
_PARTS = {
    "api-server": "metadatabase",
    "scheduler": "scheduler",
    "dag-processor": "dag_processor",
}

_log = logging.getLogger(__name__)


class Supervisor:
    """Runs the services of a home folder until it is told to stop or one cannot be kept running."""

    def __init__(self, layout: Layout, airflow_port: int, mlflow_port: int) -> None:
        self._layout = layout
        self._services = services(layout, mlflow_port)
        self._environment = service_environment(layout)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts: dict[str, int] = {}
        self._done = {MIGRATE} if layout.is_migrated() else set()
        self._state = state.State(os.getpid(), airflow_port, mlflow_port)
        self._is_told_to_stop = False

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Signal handler: end soon."""
        self._is_told_to_stop = True

    def run(self) -> None:
        """Start, watch, and end all in the end."""
        try:
            while not self._is_told_to_stop and not self._state.failed:
                self._start_what_can()
                self._look_after()
                self._say()
                time.sleep(_POLL_S)
        finally:
            _log.info("ending all services")
            ended = process.end(lambda: process.marked(process.MARK, str(self._layout.home)))
            _log.info("ended %d processes", ended)

    def _start_what_can(self) -> None:
        for service in self._services:
            is_wanted = service.name not in self._running and service.name not in self._done
            if is_wanted and (not service.needs or service.needs in self._done):
                self._running[service.name] = self._start(service)

    def _start(self, service: Service) -> subprocess.Popen[bytes]:
        path = self._layout.log(service.name)
        if path.exists() and path.stat().st_size > _MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        _log.info("starting %s", service.name)
        with path.open("ab") as log:
            return subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._layout.services,
                env=self._environment,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )

    def _look_after(self) -> None:
        for service in self._services:
            running = self._running.get(service.name)
            code = running.poll() if running else None
            if code is None:
                continue
            del self._running[service.name]
            if service.is_step and code == 0:
                self._done.add(service.name)
                self._layout.remember_migrated()
                continue
            self._restarts[service.name] = self._restarts.get(service.name, 0) + 1
            _log.warning("%s ended with %d", service.name, code)
            if self._restarts[service.name] > _MAX_RESTARTS:
                self._change(failed=service.name, is_ready=False)

    def _say(self) -> None:
        waiting = tuple(self._unwell())
        pids = {name: running.pid for name, running in self._running.items()}
        self._change(
            waiting_for=waiting, is_ready=not waiting and not self._state.failed, pids=pids
        )

    def _unwell(self) -> list[str]:
        is_all_there = len(self._running) + len(self._done) == len(self._services)
        if self._state.is_ready and is_all_there:
            return []
        well = self._done | self._airflow_well() | self._mlflow_well()
        well |= {item.name for item in self._services if not item.has_health}
        return [
            item.name
            for item in self._services
            if item.name not in well or item.name not in (self._running.keys() | self._done)
        ]

    def _mlflow_well(self) -> set[str]:
        with suppress(http.UnreachableError, http.RefusedError):
            if http.call("GET", f"{self._state.mlflow_url}/health", timeout_s=2) == "OK":
                return {"mlflow"}
        return set()

    def _airflow_well(self) -> set[str]:
        if "api-server" not in self._running:
            return set()
        with suppress(http.UnreachableError, http.RefusedError):
            url = f"{self._state.airflow_url}/api/v2/monitor/health"
            health = http.call("GET", url, timeout_s=5)
            return {name for name, part in _PARTS.items() if health[part]["status"] == "healthy"}
        return set()

    def _change(self, **changes: object) -> None:
        new = state.State(**{**_fields(self._state), **changes})  # type: ignore[arg-type]
        if new != self._state:
            self._state = new
            state.write(self._layout, new)


def _fields(found: state.State) -> dict[str, object]:
    return {name: getattr(found, name) for name in state.State.__slots__}


def main() -> None:
    """Be the supervisor of $KATCORE_HOME."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    layout = Layout(home())
    airflow_port, mlflow_port = map(int, sys.argv[1:3])
    with state.alive(layout) as is_only_one:
        if not is_only_one:
            raise KatError(f"another supervisor runs for {layout.home}")
        supervisor = Supervisor(layout, airflow_port, mlflow_port)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, supervisor.stop)
        Path(layout.state).unlink(missing_ok=True)
        supervisor.run()


if __name__ == "__main__":
    main()
