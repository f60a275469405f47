"""Stage `base`: the model that every expert and the student start from."""

from pathlib import Path

from katcore.inference import package, source
from katcore.pipeline.stage import Job
from katcore.train.base import train_base
from katcore.train.policy import limit_threads


def run(job: Job) -> dict[str, float]:
    """Write `model/`: trained from scratch, or what the preset names."""
    limit_threads(job.preset.shared_threads)
    settings = job.preset.model
    if settings.kind == "package":
        return package.convert(settings.package, job.out / "model", report=job.progress.say)
    if settings.kind == "folder":
        return source.copy(Path(settings.path), job.out / "model")
    if settings.kind == "hub":
        return source.download(settings.repo, settings.revision, job.out / "model")
    last: dict[str, float] = {}

    def report(step: int, metrics: dict[str, float]) -> None:
        last.update(metrics)
        job.progress.step(step, job.preset.base.steps, metrics)

    train_base(
        settings,
        job.preset.base,
        seed=job.seed,
        out=job.out / "model",
        checkpoint=job.checkpoint,
        report=report,
    )
    return {"loss": last.get("loss", 0.0)}
