"""Stage `rl`: group-relative policy optimisation of an expert on fresh rollouts of its own tasks.

A step's rollouts are made with the weights that the step then changes, in `epochs` passes of `minibatches`
updates each (`learner`).
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from katcore.config import is_first_process
from katcore.errors import StageError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine
from katcore.pipeline.frontier import Frontier
from katcore.pipeline.learner import Learner
from katcore.pipeline.rollouts import (
    StepRollouts,
    engine_settings,
    facts_of,
    open_rollouts,
    samples_of,
    tasks_of,
)
from katcore.pipeline.stage import Job
from katcore.rollout.single import Attempt
from katcore.schema.call import Sampling
from katcore.schema.codec import read_lines
from katcore.schema.expert import Expert
from katcore.schema.rollout import Rollout
from katcore.schema.task import Task
from katcore.train import ranks
from katcore.train.policy import limit_threads
from katcore.train.prepare import load_trainable, refuse_scattered
from katcore.train.trainer import Schedule, Trainer, engine_options


def run(job: Job) -> dict[str, float]:
    """Write `model/`, `rollouts.jsonl` and `calls.jsonl`."""
    limit_threads(job.preset.expert_threads)
    expert = job.plugins.experts()[job.spec.expert]
    start = job.input(f"{expert.name}.sft") / "model"
    return train(job, start, expert, tasks_to_attempt(job, expert))


def train(job: Job, start: Path, expert: Expert, tasks: Sequence[Task]) -> dict[str, float]:
    """Train the model of a folder on tasks, by the parts that an expert names; see `run`."""
    settings = job.preset.rl
    refuse_scattered(job.preset)
    model = load_trainable(start, job.preset, job.seed)
    schedule = Schedule(
        settings.lr,
        settings.steps * settings.epochs * settings.minibatches,
        settings.warmup,
        final_lr=settings.final_lr,
    )
    trainer = Trainer(model, schedule, **engine_options(job.preset))
    loop = _Loop(job, trainer, ChatTokenizer(start), expert)
    rewards = asyncio.run(loop.run(tasks))
    trainer.publish(job.out, tokenizer=start)
    edge = max(1, len(rewards) // 5)
    return {
        "reward_first": statistics.fmean(rewards[:edge]),
        "reward_last": statistics.fmean(rewards[-edge:]),
    }


class _Loop:
    def __init__(self, job: Job, trainer: Trainer, chat: ChatTokenizer, expert: Expert) -> None:
        self._job = job
        self._trainer = trainer
        self._settings = job.preset.rl
        self._expert = expert
        self._engine = None
        if is_first_process():  # which makes the rollouts that all learn from
            self._engine = EmbeddedEngine(trainer.model, chat, **engine_settings(job))
        self._learner = Learner(
            trainer, self._settings, self._engine, seed=job.seed, at_once=job.preset.concurrency
        )

    async def run(self, tasks: Sequence[Task]) -> list[float]:
        """All steps; mean reward of each. Goes on from the last checkpoint."""
        settings, job = self._settings, self._job
        saved = self._trainer.load(job.checkpoint)
        rewards: list[float] = list(saved.get("rewards", []))
        frontier = Frontier(tasks, job.seed + 17, saved.get("rates"))
        sampling = Sampling(settings.temperature, job.preset.max_new_tokens)
        steps = StepRollouts(job.out / "rollouts.jsonl", "rl", len(rewards))
        async with open_rollouts(job) if self._engine else nullcontext() as rollouts:
            parts = rollouts.parts(self._expert, sampling) if rollouts else None
            for step in range(len(rewards), settings.steps):
                started_s = time.perf_counter()
                made: list[Rollout] = []
                if self._engine and rollouts and parts:
                    self._engine.weights_changed(str(step))
                    attempts = (
                        Attempt(task, self._engine, number, steps.label(step))
                        for task in frontier.choose(settings.prompts, step)
                        for number in range(settings.group)
                    )
                    made = await steps.make(rollouts, attempts, parts, step)
                made = ranks.share(made)
                metrics = facts_of(made, time.perf_counter() - started_s)
                frontier.learn(made)
                metrics |= await self._learn(made) | {"pass_rate": frontier.pass_rate}
                rewards.append(metrics["reward"])
                job.progress.step(step, settings.steps, metrics)
                if (step + 1) % settings.checkpoint_every == 0:
                    self._trainer.save(job.checkpoint, rewards=rewards, rates=frontier.rates)
        steps.close()
        return rewards

    async def _learn(self, rollouts: list[Rollout]) -> dict[str, float]:
        samples = samples_of(self._job, self._expert, rollouts)
        failed = sum(len(sample.failed) for sample in samples) / max(1, len(samples))
        return await self._learner.learn(samples) | {"failed": failed}


def tasks_to_attempt(job: Job, expert: Expert) -> list[Task]:
    """The tasks that steps are drawn from."""
    tasks = tasks_of(job, expert, "train")
    if job.preset.rl.tasks == "all":
        return tasks
    demonstrations = job.input(f"{expert.name}.collect") / "rollouts.jsonl"
    seen = {rollout.task_id for rollout in read_lines(Rollout, demonstrations)}
    unseen = [task for task in tasks if task.id not in seen]
    if len(unseen) < job.preset.rl.prompts:
        raise StageError(
            f"expert {expert.name!r}: {len(unseen)} of {len(tasks)} tasks have no demonstration, and a step"
            f" attempts {job.preset.rl.prompts}; lower collect.max_tasks, have more tasks made"
            " (synthesis), or set rl.tasks: all"
        )
    return unseen
