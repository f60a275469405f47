"""One stage as a child of a scheduler's worker: its output goes on, its end comes with its parent's.

The child stays in the worker's process group, so a scheduler that signals the group ends the whole stage;
and should the worker be killed alone, the kernel ends the child.
"""

import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from katcore.config import environment, load_preset
from katcore.errors import ConfigError, StageBusyError, StageError
from katcore.pipeline.local import log_path, stage_command
from katcore.pipeline.parent import die_with_parent
from katcore.pipeline.plan import Plan, build_plan
from katcore.pipeline.stage import finished, stage_path
from katcore.plugin import Plugins

BUSY_EXIT = 75
"""How `kat <stage>` says that another process runs the stage: EX_TEMPFAIL of sysexits.h."""
RUN_MARK = "KATCORE_RUN"
"""Environment variable of all processes of one scheduled run."""

_BUSY_POLL_S = 5.0
_log = logging.getLogger(__name__)


def chosen_plan(preset: str, experts: Iterable[str], seed: int) -> Plan:
    """The plan for what a form or a request chose.

    Raises:
        ConfigError: its stages depend on each other otherwise than those of the DAG.
    """
    settings = load_preset(preset)
    if settings.distill.teacher == "best":
        raise ConfigError(
            f"preset {preset}: with distill.teacher: best the distillation waits for the experts'"
            " evaluations, which the DAG does not; run it by `kat pipeline`, or choose teacher: domain"
        )
    return build_plan(settings, Plugins.installed(), experts=experts, seed=seed)


def run_child(plan: Plan, stage_id: str, preset: str, run_id: str) -> str:
    """Run the command of a stage and return the URI it printed last.

    A finished stage is not run again; one that another process runs is waited for.

    Raises:
        StageError: the stage failed; says why in its own words, and where its log is.
    """
    done = finished(stage_path(plan, stage_id))
    if done:
        _log.info("%s: unchanged, skipped", stage_id)
        return done.path.as_uri()
    while True:
        try:
            return _attempt(plan, stage_id, preset, {RUN_MARK: run_id})
        except StageBusyError as busy:
            _log.info("%s; asking again in %g s", busy, _BUSY_POLL_S)
            time.sleep(_BUSY_POLL_S)


def reap_run(run_id: str) -> None:
    """Reclaim the sandboxes that killed stages of a run left.

    Raises:
        StageError: some stay; says which and why.
    """
    command = [sys.executable, "-m", "katcore.cli", "sandbox", "reap", "--run", run_id]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**environment(), RUN_MARK: run_id},
        preexec_fn=die_with_parent(signal.SIGTERM),
        text=True,
        check=False,
    )
    _log.info("%s", done.stderr.strip())
    if done.returncode:
        raise StageError(f"sandboxes of {run_id} are left: {done.stderr.strip()}")


def _attempt(plan: Plan, stage_id: str, preset: str, marks: Mapping[str, str]) -> str:
    log = Path(log_path(plan, stage_id))
    log.parent.mkdir(parents=True, exist_ok=True)
    last = b""
    with tempfile.TemporaryFile() as answer, log.open("ab", buffering=0) as kept:
        process = subprocess.Popen(
            stage_command(plan, stage_id, preset),
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.PIPE,
            env={**environment(), **marks},
            preexec_fn=die_with_parent(signal.SIGTERM),
        )
        assert process.stderr
        for line in process.stderr:
            kept.write(line)
            last = line.strip() or last
            _log.info("%s", line.decode(errors="replace").rstrip())
        code = process.wait()
        answer.seek(0)
        lines = answer.read().decode().split()
    if code == BUSY_EXIT:
        raise StageBusyError(f"{stage_id} is being run by another process")
    if code or not lines:
        raise StageError(_why(plan, stage_id, code, last.decode(errors="replace")))
    return lines[-1]


def _why(plan: Plan, stage_id: str, code: int, last: str) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    return f"stage {stage_id} {how}: {last or 'no output'}\nits log: {log_path(plan, stage_id)}"
