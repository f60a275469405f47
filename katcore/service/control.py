"""`kat up` and `kat down`."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from katcore.config import environment, home
from katcore.errors import ServiceError
from katcore.pipeline.parent import die_with_parent
from katcore.service import port, process, state
from katcore.service.layout import USER, Layout, prepare

AIRFLOW_PORT = 8080
MLFLOW_PORT = 5000
Say = Callable[[str], None]

_SUPERVISOR = (sys.executable, "-P", "-m", "katcore.service.supervisor")
# Since the last that became well. A service that dies is noticed at once; this is for one that hangs, and a
# starved machine must not look like one.
_HEALTHY_WITHIN_S = 600.0
_SAID_EVERY_S = 15.0
_STOPPED_WITHIN_S = 45.0


def up(airflow_port: int, mlflow_port: int, say: Say, *, is_owned: bool = False) -> state.State:
    """Start the services, or find them running; returns when all are well.

    Args:
        airflow_port: Where Airflow should listen; the next free port is taken if another program does.
        mlflow_port: The same for MLflow.
        say: Is told what happens, line by line.
        is_owned: The services end with this process, however it ends.

    Raises:
        ServiceError: one does not start; says which, with the end of its log.
    """
    layout = Layout(home())
    with state.starting(layout):
        if state.is_alive(layout):
            say("Airflow and MLflow are already up")
        else:
            _start(layout, airflow_port, mlflow_port, say, is_owned=is_owned)
        return _wait(layout, say)


def down() -> int:
    """End the services and all that they left; returns how many processes there were."""
    layout = Layout(home())
    if not layout.services.is_dir():
        return 0
    with state.starting(layout):
        return _end_all(layout)


@contextmanager
def running(say: Say) -> Iterator[tuple[state.State, bool]]:
    """The services, started if they are not; those started are ended after. True: started."""
    layout = Layout(home())
    is_ours = not state.is_alive(layout)
    try:
        yield up(AIRFLOW_PORT, MLFLOW_PORT, say, is_owned=is_ours), is_ours
    finally:
        if is_ours:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                say("stopping Airflow and MLflow")
                down()
            finally:
                signal.signal(signal.SIGINT, before)


def where(found: state.State) -> list[str]:
    """Lines that say where the services are."""
    layout = Layout(home())
    return [
        f"Airflow: {found.airflow_url} (user {USER}, password in {layout.passwords})",
        f"MLflow:  {found.mlflow_url}",
        f"logs:    {layout.logs}",
    ]


def _start(
    layout: Layout, airflow_port: int, mlflow_port: int, say: Say, *, is_owned: bool
) -> None:
    left = _end_all(layout)
    if left:
        say(f"ended {left} processes that an earlier start left")
    airflow_port = port.choose(airflow_port, "Airflow", say)
    mlflow_port = port.choose(mlflow_port, "MLflow", say, taken=(airflow_port,))
    prepare(layout, airflow_port)
    say(f"starting Airflow and MLflow; their logs are in {layout.logs}")
    with layout.log("supervisor").open("ab") as log:
        supervisor = subprocess.Popen(
            [*_SUPERVISOR, str(airflow_port), str(mlflow_port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=layout.services,
            env=environment() | {process.MARK: str(layout.home), "KATCORE_HOME": str(layout.home)},
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGTERM) if is_owned else None,
        )
    while not state.is_alive(layout) or not layout.state.exists():
        if supervisor.poll() is not None:
            raise ServiceError(f"the supervisor did not start: {_end_of_log(layout, 'supervisor')}")
        time.sleep(0.1)


def _wait(layout: Layout, say: Say) -> state.State:
    started_s = said_s = time.monotonic()
    waiting_for: tuple[str, ...] = ("the supervisor",)
    while time.monotonic() - started_s < _HEALTHY_WITHIN_S:
        found = state.read(layout)
        if found and found.is_ready:
            return found
        if found and found.failed:
            raise ServiceError(
                f"{found.failed} does not keep running: {_end_of_log(layout, found.failed)}"
            )
        if not state.is_alive(layout):
            raise ServiceError(f"the supervisor ended: {_end_of_log(layout, 'supervisor')}")
        if found and found.waiting_for != waiting_for:
            waiting_for, started_s = found.waiting_for, time.monotonic()
        if time.monotonic() - said_s > _SAID_EVERY_S:
            said_s = time.monotonic()
            say(f"waiting for {', '.join(waiting_for)}")
        time.sleep(0.2)
    _end_all(layout)
    raise ServiceError(
        f"{', '.join(waiting_for)} not well after {_HEALTHY_WITHIN_S:g} s, so all was stopped;"
        f" is the machine busy? See {layout.logs}, and start again"
    )


def _end_all(layout: Layout) -> int:
    found = state.read(layout)
    count = 0
    if found and state.is_alive(layout):
        count = 1 + len(found.pids)
        with suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGTERM)
        deadline_s = time.monotonic() + _STOPPED_WITHIN_S
        while state.is_alive(layout) and time.monotonic() < deadline_s:
            time.sleep(0.1)
    count += process.end(lambda: process.marked(process.MARK, str(layout.home)))
    layout.state.unlink(missing_ok=True)
    return count


def _end_of_log(layout: Layout, service: str) -> str:
    path = layout.log(service)
    lines = path.read_text(errors="replace")[-4000:].strip().splitlines() if path.exists() else []
    return "\n".join([*lines[-8:], f"its log: {path}"])
