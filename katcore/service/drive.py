"""`kat run`: one run of the DAG, from the start of the services to its end."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from katcore.config import home, preset_names
from katcore.errors import ServiceError, StageError
from katcore.pipeline.child import RUN_MARK
from katcore.pipeline.local import log_path
from katcore.pipeline.plan import Plan
from katcore.service import control, http, process
from katcore.service.airflow import FINAL, Airflow
from katcore.service.layout import Layout

DAG_ID = "specialize_then_unify"
Tick = Callable[[Sequence[str]], None]

_PARSED_WITHIN_S = 600.0
_ASK_EVERY_S = 1.0
_TICK_S = 0.25
_SILENT_FOR_S = 180.0


def run(plan: Plan, preset: str, tick: Tick, say: control.Say) -> None:
    """Run a plan through Airflow; returns when all of it is done.

    Starts the services if they are not running, and ends what it started. Interrupted, it cancels the run and
    ends its stages; the same command goes on from there.

    Raises:
        StageError: a stage failed; names it, its last words and its log.
        ServiceError: Airflow or MLflow does not start or answer.
    """
    conf = _preset(preset) | {"experts": list(plan.experts), "seed": plan.seed}
    with _terminated_as_interrupted(), control.running(say) as (services, is_ours):
        for line in control.where(services):
            say(line)
        airflow = Airflow(services.airflow_url, Layout(home()).password())
        _wait_for_dag(airflow, say)
        earlier = airflow.unfinished(DAG_ID)
        if is_ours:
            # Nobody else can have started them: they are left from a run that was killed.
            for run_id in earlier:
                airflow.cancel(DAG_ID, run_id)
        elif earlier:
            say(f"waiting for {', '.join(earlier)} to end; one run goes at a time")
        run_id = airflow.start(DAG_ID, conf)
        say(f"run {run_id}: {services.airflow_url}/dags/{DAG_ID}/runs/{run_id}")
        try:
            _follow(airflow, run_id, plan, tick, say)
        except BaseException:
            _cancel(airflow, run_id)
            raise


def _preset(preset: str) -> dict[str, Any]:
    if preset in preset_names():
        return {"preset": preset}
    return {"preset_file": str(Path(preset).resolve())}


def _wait_for_dag(airflow: Airflow, say: control.Say) -> None:
    deadline_s = time.monotonic() + _PARSED_WITHIN_S
    while time.monotonic() < deadline_s:
        dag = airflow.dag(DAG_ID)
        if dag:
            if dag["is_paused"]:
                say(f"{DAG_ID} was paused; it is not any more")
                airflow.unpause(DAG_ID)
            return
        time.sleep(_ASK_EVERY_S)
    raise ServiceError(
        f"Airflow has not parsed {DAG_ID} after {_PARSED_WITHIN_S:g} s;"
        f" see {Layout(home()).log('dag-processor')}"
    )


def _follow(airflow: Airflow, run_id: str, plan: Plan, tick: Tick, say: control.Say) -> None:
    asked_s = answered_s = time.monotonic()
    repeated: set[str] = set()
    while True:
        tick(())
        time.sleep(_TICK_S)
        if time.monotonic() - asked_s < _ASK_EVERY_S:
            continue
        asked_s = time.monotonic()
        try:
            state, tasks = airflow.state(DAG_ID, run_id), airflow.tasks(DAG_ID, run_id)
        except http.UnreachableError:
            if asked_s - answered_s > _SILENT_FOR_S:
                raise
            continue
        answered_s = asked_s
        # Not a teardown, which has a warning in its own log: the work is done.
        failed = [name for name in plan.stages if tasks.get(name) == "failed"]
        if failed or state == "failed":
            raise StageError(_why(plan, run_id, failed))
        for name in {name for name, found in tasks.items() if found == "up_for_retry"} - repeated:
            repeated.add(name)
            say(f"{name} failed once and is tried again: {_last_line(plan, name)}")
        if state in FINAL:
            tick(())
            return


def _why(plan: Plan, run_id: str, failed: Sequence[str]) -> str:
    if not failed:
        return f"run {run_id} was ended by somebody else; the same command goes on from there"
    name, logs = failed[0], Layout(home()).logs
    if not Path(log_path(plan, name)).exists():
        return f"stage {name} could not be started by Airflow; see {logs}/scheduler.log and {logs}/airflow"
    return (
        f"stage {name} failed: {_last_line(plan, name)}\n"
        f"its log: {log_path(plan, name)}; the same command goes on from there"
    )


def _last_line(plan: Plan, name: str) -> str:
    path = Path(log_path(plan, name)) if name in plan.stages else None
    lines = path.read_text(errors="replace")[-4000:].split("\n") if path and path.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return "\n".join(said[-3:]) if said else "it said nothing"


def _cancel(airflow: Airflow, run_id: str) -> None:
    with suppress(ServiceError):
        airflow.cancel(DAG_ID, run_id)
    process.end(lambda: process.marked(RUN_MARK, run_id))


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [
        (number, signal.signal(number, interrupt)) for number in (signal.SIGTERM, signal.SIGHUP)
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
