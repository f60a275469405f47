"""Running one stage: skip what is done, resume what was begun, publish whole or not at all.

    <home>/stages/<stage id>/<key>/         finished: never changed again; manifest.json hashes each file
    <home>/stages/<stage id>/<key>.work/    begun: checkpoints, progress.json, and `out/` as it grows

A finished folder appears by one rename after everything in it is on disk. A lock keeps two processes from
running the same key. Where several processes train together, the first does all that; the others compute.
"""

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

from katcore.config import Preset, home, is_first_process
from katcore.errors import StageBusyError, StageError
from katcore.pipeline.lineage import ancestors
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.progress import Progress, Show, Silent
from katcore.plugin import Plugins
from katcore.schema.event import StageFinished

_PACKAGES = ("katcore", "torch", "transformers", "tokenizers", "mlflow", "apache-airflow")


@dataclass(frozen=True, slots=True)
class Job:
    """What a stage function gets. It writes into `out`; `work` keeps what it needs to resume."""

    spec: StageSpec
    preset: Preset
    seed: int
    plugins: Plugins
    inputs: Mapping[str, Path]
    work: Path
    out: Path
    progress: Progress | Silent

    def input(self, stage_id: str) -> Path:
        """The finished folder of an input."""
        return self.inputs[stage_id]

    @property
    def checkpoint(self) -> Path:
        """Where training leaves what it needs to go on."""
        return self.work / "checkpoint"


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage does, and the model folders it makes its own from.

    `experiment` is MLflow's, if not the stage's; `show` is told step, steps and metrics.
    """

    run: Callable[[Job], dict[str, float]]
    models: tuple[Path, ...] = ()
    experiment: str = ""
    show: Show | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished stage."""

    path: Path
    is_skipped: bool
    seconds: float
    metrics: dict[str, float]


def stage_path(plan: Plan, stage_id: str) -> Path:
    """Where the finished stage is, or will be."""
    return home() / "stages" / stage_id / plan.keys[plan.find(stage_id).id]


def run_stage(plan: Plan, stage_id: str, plugins: Plugins) -> Finished:
    """Run a stage, or find it done.

    Raises:
        StageError: an input is missing, another process runs it, the disk is full, or a finished folder is
            not what its manifest says.
    """
    spec = plan.find(stage_id)
    path = stage_path(plan, stage_id)
    found = finished(path)
    if found:
        _notify(plugins, spec, found)
        return found
    inputs = {name: stage_path(plan, name) for name in spec.inputs}
    missing = [name for name, folder in inputs.items() if not finished(folder)]
    if missing:
        raise StageError(f"{stage_id} needs {', '.join(missing)}, not made yet; run that first")
    models = tuple(folder / "model" for folder in inputs.values() if (folder / "model").is_dir())
    run = import_module(f"katcore.pipeline.{spec.stage}").run
    return make(path, plan, spec, plugins, Work(run, models))


def make(path: Path, plan: Plan, spec: StageSpec, plugins: Plugins, work: Work) -> Finished:
    """Do a stage's work and publish it at `path`, unless it is there.

    Raises:
        StageError: another process is at it, or the disk is full.
    """
    if not is_first_process():
        return _compute_only(path, plan, spec, plugins, work)
    folder = path.with_name(f"{path.name}.work")
    with _locked(path), _full_disk_said(path):
        done = finished(path)
        if done:
            return done
        out = folder / "out"
        out.mkdir(parents=True, exist_ok=True)
        inputs = {name: stage_path(plan, name) for name in spec.inputs}
        progress = Progress(spec, folder, plan, work.experiment, work.show)
        preset = plan.preset.for_expert(spec.expert)
        job = Job(spec, preset, plan.seed, plugins, inputs, folder, out, progress)
        started_s = time.time()
        metrics = work.run(job)
        _publish(job, plan, path, work.models, (started_s, metrics))
        progress.close()
        shutil.rmtree(folder)
    result = Finished(path, False, time.time() - started_s, metrics)
    _notify(plugins, spec, result)
    return result


def _compute_only(
    path: Path, plan: Plan, spec: StageSpec, plugins: Plugins, work: Work
) -> Finished:
    """The work of a process that is not the first: what it writes is thrown away."""
    if done := finished(path):
        return done
    inputs = {name: stage_path(plan, name) for name in spec.inputs}
    preset = plan.preset.for_expert(spec.expert)
    with tempfile.TemporaryDirectory(prefix="kat-rank-") as out:
        folder = path.with_name(f"{path.name}.work")
        job = Job(spec, preset, plan.seed, plugins, inputs, folder, Path(out), Silent())
        started_s = time.time()
        metrics = work.run(job)
    return Finished(path, False, time.time() - started_s, metrics)


def finished(path: Path) -> Finished | None:
    """The finished stage at `path`, or None. A folder that lost a file is an error, not unfinished."""
    manifest = path / "manifest.json"
    if not manifest.exists():
        return None
    content = json.loads(manifest.read_bytes())
    for name, entry in content["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            raise StageError(f"{file}: not as its manifest says; remove {path} to make it again")
    return Finished(path, True, content["seconds"], content["metrics"])


def _publish(
    job: Job,
    plan: Plan,
    path: Path,
    models: Iterable[Path],
    done: tuple[float, dict[str, float]],
) -> None:
    started_s, metrics = done
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    manifest = {
        "schema_version": 1,
        "id": job.spec.id,
        "key": path.name,
        "spec": asdict(job.spec),
        "inputs": {name: plan.keys[name] for name in job.spec.inputs},
        "ancestors": sorted({name for model in models for name in ancestors(model)}),
        "preset": plan.preset.name,
        "seed": plan.seed,
        "packages": {name: _version(name) for name in _PACKAGES},
        "metrics": metrics,
        "started": started_s,
        "seconds": round(time.time() - started_s, 2),
        "cpu_seconds": round(sum(item.ru_utime + item.ru_stime for item in usage), 2),
        "max_rss_mib": max(item.ru_maxrss for item in usage) // 1024,
        "files": {
            str(file.relative_to(job.out)): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(job.out.rglob("*"))
            if file.is_file() and file != job.out / "manifest.json"
        },
    }
    (job.out / "manifest.json").write_text(json.dumps(manifest, indent=1, default=str))
    os.sync()
    job.out.rename(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageBusyError(
                f"{path.parent.name} is being run by another process; wait for it"
            ) from error
        yield


@contextmanager
def _full_disk_said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        free_mib = shutil.disk_usage(path.parent).free >> 20
        raise StageError(
            f"{path.parent}: the disk is full ({free_mib} MiB free); make room and run the same command:"
            " what was finished is kept, and this stage goes on from its last checkpoint"
        ) from error


def _notify(plugins: Plugins, spec: StageSpec, done: Finished) -> None:
    event = StageFinished(spec.id, str(done.path), done.is_skipped, done.seconds, done.metrics)
    plugins.notify("katcore_stage_finished", event)
