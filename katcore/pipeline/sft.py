"""Stage `sft`: fine-tune the base on an expert's demonstrations, or the student on all of them."""

from collections.abc import Sequence
from pathlib import Path

from katcore.config import SftSettings, learning_rate
from katcore.errors import StageError
from katcore.pipeline.stage import Job
from katcore.schema.codec import read_lines
from katcore.schema.sample import Sample
from katcore.train.policy import limit_threads
from katcore.train.prepare import load_trainable
from katcore.train.sft import fit
from katcore.train.trainer import Schedule, Trainer, engine_options


def run(job: Job) -> dict[str, float]:
    """Write `model/`."""
    is_student = not job.spec.expert
    limit_threads(job.preset.expert_threads)  # the student's SFT runs beside an expert's RL
    samples = [
        sample
        for name in job.inputs
        if name.endswith(".collect")
        for sample in read_lines(Sample, job.input(name) / "samples.jsonl")
    ]
    settings = job.preset.student if is_student else job.preset.sft
    return train(job, job.input("base") / "model", samples, settings)


def train(
    job: Job, start: Path, samples: Sequence[Sample], settings: SftSettings
) -> dict[str, float]:
    """Fine-tune the model of a folder; see `run`."""
    context = job.preset.model.context
    usable = [sample for sample in samples if len(sample.tokens) <= context]
    if not usable:
        raise StageError(
            f"none of {len(samples)} samples has at most {context} tokens: there is nothing to train on"
        )
    model = load_trainable(start, job.preset, job.seed)
    lr = learning_rate(settings, job.preset.lora)
    schedule = Schedule(lr, settings.steps, settings.warmup, settings.final_lr)
    last: dict[str, float] = {}

    def report(step: int, metrics: dict[str, float]) -> None:
        last.update(metrics)
        job.progress.step(step, settings.steps, metrics)

    trainer = Trainer(model, schedule, **engine_options(job.preset))
    fit(
        trainer,
        usable,
        settings,
        seed=job.seed,
        checkpoint=job.checkpoint,
        report=report,
    )
    trainer.publish(job.out, tokenizer=start)
    return {"loss": last.get("loss", 0.0), "num_samples": float(len(usable))}
