"""Stage `synthesize`: an expert's synthesizer makes its tasks."""

import shutil

from katcore.dataset.harbor import SPLITS
from katcore.errors import StageError
from katcore.pipeline.stage import Job


def run(job: Job) -> dict[str, float]:
    """Write `tasks/<split>/<task id>/`; begins anew after an interruption (synthesis is deterministic)."""
    expert = job.plugins.experts()[job.spec.expert]
    options = {**expert.synthesis, **job.preset.synthesis.get(expert.name, {})}
    synthesizer = job.plugins.make("synthesizer", expert.synthesizer, options)
    root = job.out / "tasks"
    shutil.rmtree(root, ignore_errors=True)
    synthesizer.synthesize(root, seed=job.seed, report=job.progress.say)
    counts = {split: sum(1 for _ in (root / split).glob("*/task.toml")) for split in SPLITS}
    for split, num in counts.items():
        if not num:
            raise StageError(f"synthesizer {expert.synthesizer!r} made no task of split {split!r}")
    return {f"num_{split.replace('-', '_')}": float(num) for split, num in counts.items()}
