"""Supervised fine-tuning on verified demonstrations."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from katcore.config import SftSettings
from katcore.schema.sample import Sample
from katcore.train.batch import turns
from katcore.train.objective import Metrics, Sft
from katcore.train.trainer import Trainer


def fit(
    trainer: Trainer,
    samples: Sequence[Sample],
    settings: SftSettings,
    *,
    seed: int,
    checkpoint: Path,
    report: Callable[[int, Metrics], None],
) -> None:
    """Take `settings.steps` steps; continues from `checkpoint` where there is one.

    The samples of a step depend on the seed and the step's number alone, so a resumed run is the same run.
    """
    trainer.load(checkpoint)
    if settings.mask_failed:
        samples = [left for sample in samples if any((left := without_failed(sample)).trained)]
    while trainer.step_number < settings.steps:
        step = trainer.step_number
        rows = [samples[index] for index in draw(len(samples), settings.batch, seed, step)]
        report(step, trainer.update(rows, Sft()))
        if (step + 1) % settings.checkpoint_every == 0:
            trainer.save(checkpoint)


def without_failed(sample: Sample) -> Sample:
    """With answers that failed as context (error-masked fine-tuning, KAT-Coder V1, arXiv 2510.18779)."""
    if not sample.failed:
        return sample
    numbers = iter(turns(sample))
    trained = tuple(yes and next(numbers) not in sample.failed for yes in sample.trained)
    return replace(sample, trained=trained)


def draw(num: int, batch: int, seed: int, step: int) -> list[int]:
    """The indices of a step: consecutive slices of one fresh permutation per epoch."""
    batch = min(batch, num)
    per_epoch = num // batch
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
    start = step % per_epoch * batch
    return torch.randperm(num, generator=generator)[start : start + batch].tolist()
