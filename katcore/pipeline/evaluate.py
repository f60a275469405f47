"""Stage `evaluate`: models on held-out tasks, the same tasks for every model and seed."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from katcore.pipeline.engines import open_finished
from katcore.pipeline.plan import MODES, UNIFIED
from katcore.pipeline.rollouts import RolloutFile, Rollouts, open_rollouts, tasks_of
from katcore.pipeline.stage import Job
from katcore.protocols import Engine
from katcore.rollout.single import Attempt
from katcore.schema.call import Sampling
from katcore.schema.expert import Expert
from katcore.schema.task import Task
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


@dataclass(slots=True)
class _Part:
    """One model on the tasks of one domain in one mode; `done` has the rewards of what was scored so far."""

    column: str
    mode: str
    expert: Expert
    tasks: list[Task]
    file: RolloutFile
    done: dict[str, float]

    def missing(self) -> list[Task]:
        """The tasks without a reward: not attempted, or lost to infrastructure."""
        return [task for task in self.tasks if task.id not in self.done]


async def _evaluate(job: Job, models: dict[str, Path]) -> dict[str, float]:
    parts = list(_parts(job, models))
    total = sum(len(part.tasks) for part in parts)
    num = sum(len(part.done) for part in parts)
    async with open_rollouts(job) as rollouts:
        for column, folder in models.items():
            own = [part for part in parts if part.column == column and part.missing()]
            if not own:  # a server would take minutes to start
                continue
            async with open_finished(job, folder, column) as engine:
                for part in own:
                    async for _ in _attempted(rollouts, engine, part):
                        num += 1
                        job.progress.step(num - 1, total)
    metrics = {
        f"{part.column}/{part.mode}/{part.expert.name}": sum(part.done.values())
        / max(1, len(part.done))
        for part in parts
    }
    for part in parts:
        part.file.close()
    job.progress.step(total - 1, total, metrics)
    return metrics


def _parts(job: Job, columns: Iterable[str]) -> Iterator[_Part]:
    experts = job.plugins.experts()
    names = [
        name.removesuffix(".synthesize") for name in job.inputs if name.endswith(".synthesize")
    ]
    tasks = {(mode, name): held_out(job, experts[name], mode) for mode in MODES for name in names}
    for column in columns:
        for (mode, name), chosen in tasks.items():
            if _counts(job, column, name):
                file = RolloutFile(job.out / f"{column}.{mode}.{name}.jsonl")
                done = {one.task_id: one.reward for one in file.read() if one.reward is not None}
                yield _Part(column, mode, experts[name], chosen, file, done)


async def _attempted(rollouts: Rollouts, engine: Engine, part: _Part) -> AsyncIterator[None]:
    """Make what is missing of a part; yields at each that ends."""
    preset = rollouts.job.preset
    temperature = preset.evaluate.temperature if part.mode == "sampled" else 0.0
    parts = rollouts.parts(part.expert, Sampling(temperature, preset.max_new_tokens))
    label = f"{part.column}-{part.mode}"
    attempts = (Attempt(task, engine, label=label) for task in part.missing())
    async for rollout in rollouts.run(attempts, parts):
        part.file.append(rollout)
        if rollout.reward is not None:
            part.done[rollout.task_id] = rollout.reward
        yield


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
