"""All stages of a plan without Airflow: each in a process of its own, as many at once as the plan allows.

Killed at any point, the same command goes on: finished stages are found, the others resume.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from katcore.config import environment
from katcore.errors import StageError
from katcore.pipeline.parent import die_with_parent
from katcore.pipeline.plan import Plan
from katcore.pipeline.stage import finished, stage_path

_MAX_RUNNING = 2
_POLL_S = 0.2
_STOP_S = 10.0


def stage_command(plan: Plan, stage_id: str, preset: str) -> list[str]:
    """The command line that runs one stage of the plan."""
    spec = plan.find(stage_id)
    command = [sys.executable, "-m", "katcore.cli", spec.stage, "--preset", preset]
    command += ["--seed", str(plan.seed), "--experts", ",".join(plan.experts)]
    return command + (["--expert", spec.expert] if spec.expert else [])


def run_all(plan: Plan, preset: str, tick: Callable[[Sequence[str]], None]) -> None:
    """Run every stage that is not finished; `tick` is told what runs, several times a second.

    Raises:
        StageError: a stage failed; names it and its log. What runs beside it is stopped, resumable.
    """
    done = {name for name in plan.stages if finished(stage_path(plan, name))}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while len(done) < len(plan.stages):
            for name, spec in plan.stages.items():
                is_ready = name not in done and name not in running and done.issuperset(spec.inputs)
                if is_ready and len(running) < _MAX_RUNNING:
                    running[name] = _start(plan, name, preset)
            tick(tuple(running))
            time.sleep(_POLL_S)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    _check(plan, name, process.returncode)
                    del running[name]
                    done.add(name)
        tick(())
    finally:
        _stop(running.values())


def log_path(plan: Plan, stage_id: str) -> str:
    """Where a stage's own output goes."""
    path = stage_path(plan, stage_id)
    return str(path.with_name(f"{path.name}.log"))


def _start(plan: Plan, name: str, preset: str) -> subprocess.Popen[bytes]:
    path = log_path(plan, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab") as log:
        return subprocess.Popen(
            stage_command(plan, name, preset),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(),
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGTERM),
        )


def _check(plan: Plan, name: str, code: int) -> None:
    if code:
        with open(log_path(plan, name), "rb") as log:
            lines = log.read()[-2000:].decode(errors="replace").strip().splitlines()
        why = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        raise StageError(
            f"stage {name} {why}: {lines[-1] if lines else 'no output'}\n"
            f"its log: {log_path(plan, name)}; run the same command to go on from here"
        )


def _stop(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """End whole process groups: a stage that is gone may have left children that are not."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
