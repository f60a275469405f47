"""Stage `evaluate`: models on held-out tasks, the same tasks for every model and seed."""

import asyncio
import random
from pathlib import Path

from katcore.inference.embedded import open_engine
from katcore.pipeline.plan import MODES, UNIFIED
from katcore.pipeline.rollouts import RolloutFile, engine_settings, open_rollouts, tasks_of
from katcore.pipeline.stage import Job
from katcore.rollout.single import Attempt
from katcore.schema.call import Sampling
from katcore.schema.expert import Expert
from katcore.schema.task import Task
from katcore.train import ranks
from katcore.train.policy import limit_threads


def run(job: Job) -> dict[str, float]:
    """Write `<column>.<mode>.<expert>.jsonl` of rollouts for every model and both modes."""
    is_unified = not job.spec.expert
    limit_threads(job.preset.shared_threads if is_unified else job.preset.expert_threads)
    models = columns(job)
    return asyncio.run(_evaluate(job, models))


def columns(job: Job) -> dict[str, Path]:
    """The models to evaluate by column name: base, sft and rl of an expert; or the unified one."""
    if job.spec.expert:
        names = {"base": "base", "sft": f"{job.spec.expert}.sft", "rl": f"{job.spec.expert}.rl"}
    else:
        names = {"unified": f"{UNIFIED}.distill"}
    return {column: job.input(name) / "model" for column, name in names.items()}


async def _evaluate(job: Job, models: dict[str, Path]) -> dict[str, float]:
    experts = job.plugins.experts()
    names = [
        name.removesuffix(".synthesize") for name in job.inputs if name.endswith(".synthesize")
    ]
    tasks = {(mode, name): held_out(job, experts[name], mode) for mode in MODES for name in names}
    total = sum(
        len(chosen)
        for column in models
        for (_, name), chosen in tasks.items()
        if _counts(job, column, name)
    )
    metrics: dict[str, float] = {}
    num = 0
    async with open_rollouts(job) as rollouts:
        for column, folder in models.items():
            engine = open_engine(
                folder, **engine_settings(job), device=ranks.device(job.preset.scale.device)
            )
            for (mode, name), chosen in tasks.items():
                if not _counts(job, column, name):
                    continue
                temperature = job.preset.evaluate.temperature if mode == "sampled" else 0.0
                sampling = Sampling(temperature, job.preset.max_new_tokens)
                parts = rollouts.parts(experts[name], sampling)
                file = RolloutFile(job.out / f"{column}.{mode}.{name}.jsonl")
                done = {rollout.task_id: rollout.reward for rollout in file.read()}
                attempts = (
                    Attempt(task, engine, label=f"{column}-{mode}")
                    for task in chosen
                    if task.id not in done
                )
                num += len(done)
                async for rollout in rollouts.run(attempts, parts):
                    file.append(rollout)
                    done[rollout.task_id] = rollout.reward
                    num += 1
                    job.progress.step(num - 1, total)
                file.close()
                scored = [reward for reward in done.values() if reward is not None]
                metrics[f"{column}/{mode}/{name}"] = sum(scored) / max(1, len(scored))
    job.progress.step(total - 1, total, metrics)
    return metrics


def _counts(job: Job, column: str, name: str) -> bool:
    """Of an expert, other domains are asked of what may teach them alone."""
    return not job.spec.expert or name == job.spec.expert or column == "rl"


def held_out(job: Job, expert: Expert, mode: str) -> list[Task]:
    """The tasks of the evaluation: a fixed draw from the split, whatever the run's seed.

    Those that are sampled are among the greedy ones.
    """
    tasks = tasks_of(job, expert, "held-out")
    settings = job.preset.evaluate
    num = settings.tasks
    if mode == "sampled":
        num = min(num, settings.sampled_tasks)
    drawn = random.Random(0).sample(tasks, len(tasks))
    return sorted(drawn[:num], key=lambda task: task.id)
