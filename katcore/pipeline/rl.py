"""Stage `rl`: group-relative policy optimisation of an expert on fresh rollouts of its own tasks.

A step's rollouts are made with the weights that the step then changes, in `epochs` passes of `minibatches`
updates each (`learner`), or with some that are a few steps older (`serve.staleness`).
"""

import asyncio
import statistics
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from katcore.config import is_first_process, learning_rate
from katcore.errors import StageError
from katcore.pipeline.engines import Engines, open_engines
from katcore.pipeline.frontier import Frontier, with_differences
from katcore.pipeline.learner import Learner
from katcore.pipeline.rollouts import (
    Rollouts,
    StepRollouts,
    open_rollouts,
    samples_of,
    tasks_of,
)
from katcore.pipeline.stage import Job
from katcore.pipeline.stream import Make, Stream
from katcore.protocols import Engine
from katcore.rollout.single import Attempt
from katcore.schema.call import Sampling
from katcore.schema.codec import read_lines
from katcore.schema.expert import Expert
from katcore.schema.rollout import Rollout
from katcore.schema.task import Task
from katcore.train.policy import limit_threads
from katcore.train.prepare import load_frozen, load_trainable
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
    model = load_trainable(start, job.preset, job.seed)
    schedule = Schedule(
        learning_rate(settings, job.preset.lora),
        settings.steps * settings.epochs * settings.minibatches,
        settings.warmup,
        final_lr=settings.final_lr,
    )
    trainer = Trainer(model, schedule, **engine_options(job.preset))
    loop = _Loop(job, trainer, start, expert, tasks)
    rewards = asyncio.run(loop.run())
    trainer.publish(job.out, tokenizer=start)
    edge = max(1, len(rewards) // 5)
    return {
        "reward_first": statistics.fmean(rewards[:edge]),
        "reward_last": statistics.fmean(rewards[-edge:]),
    }


class _Loop:
    def __init__(
        self, job: Job, trainer: Trainer, start: Path, expert: Expert, tasks: Sequence[Task]
    ) -> None:
        self._job = job
        self._trainer = trainer
        self._start = start
        self._settings = job.preset.rl
        self._reference = None
        if self._settings.kl:
            self._reference = load_frozen(start, job.preset, beside=trainer.model)
        self._expert = expert
        self._frontier = Frontier(tasks, job.seed + 17)
        self._by_id = {task.id: task for task in tasks}
        self._rewards: list[float] = []
        self._chosen: dict[int, list[str]] = {}
        """The tasks of steps that were begun and not learnt from, which later rates would not choose."""

    async def run(self) -> list[float]:
        """All steps; mean reward of each. Goes on from the last checkpoint."""
        settings, job = self._settings, self._job
        async with AsyncExitStack() as stack:
            engines, make = None, None
            if is_first_process():  # which makes the rollouts that all learn from
                rollouts = await stack.enter_async_context(open_rollouts(job))
                engines = await stack.enter_async_context(
                    open_engines(job, self._trainer.model, self._start)
                )
                make = self._maker(rollouts, engines.engine)
            stream = Stream(
                make, settings.steps, engines, job.preset.serve.staleness, self._trainer.weights
            )
            await self._steps(await stack.enter_async_context(stream), engines)
        self._made.close()
        return self._rewards

    def _maker(self, rollouts: Rollouts, engine: Engine) -> Make:
        sampling = Sampling(self._settings.temperature, self._job.preset.max_new_tokens)
        parts = rollouts.parts(self._expert, sampling)

        def make(step: int) -> Coroutine[Any, Any, list[Rollout]]:
            def attempted(tasks: Sequence[Task]) -> Coroutine[Any, Any, list[Rollout]]:
                work = [(attempt, parts) for attempt in self._attempts(engine, tasks, step)]
                return self._made.make(rollouts, work, step)

            # Chosen by the rates of now, whenever the first of them is begun.
            return with_differences(attempted, self._tasks(step), self._settings.prompts)

        return make

    async def _steps(self, stream: Stream, engines: Engines | None) -> None:
        settings, job = self._settings, self._job
        learner = Learner(
            self._trainer,
            settings,
            engines.engine if engines else None,
            seed=job.seed,
            at_once=job.preset.concurrency,
            run=stream.run,
            reference=self._reference,
        )
        self._go_on()
        for step in range(len(self._rewards), settings.steps):
            made, metrics = await stream.of(step)
            self._frontier.learn(made)
            samples = await stream.aside(samples_of, job, self._expert, made)
            metrics["failed"] = sum(len(one.failed) for one in samples) / max(1, len(samples))
            metrics["tasks"] = float(len({rollout.task_id for rollout in made}))
            metrics |= await learner.learn(samples)
            metrics |= {"pass_rate": self._frontier.pass_rate} | stream.shares()
            self._rewards.append(metrics["reward"])
            self._made.forget(step)
            self._chosen.pop(step, None)
            await stream.aside(job.progress.step, step, settings.steps, metrics)
            if (step + 1) % settings.checkpoint_every == 0:
                await stream.aside(self._save)

    def _go_on(self) -> None:
        """From the last checkpoint, if there is one."""
        saved = self._trainer.load(self._job.checkpoint)
        self._rewards = list(saved.get("rewards", []))
        self._frontier.rates = dict(saved.get("rates", {}))
        self._chosen = dict(saved.get("chosen", {}))
        self._made = StepRollouts(self._job.out / "rollouts.jsonl", "rl", len(self._rewards))

    def _tasks(self, step: int) -> list[Task]:
        """Those of a step, and then those that may take their places."""
        if step not in self._chosen:
            num = self._settings.prompts * (1 + self._settings.resample)
            self._chosen[step] = [task.id for task in self._frontier.choose(num, step)]
        return [self._by_id[name] for name in self._chosen[step]]

    def _attempts(self, engine: Engine, tasks: Iterable[Task], step: int) -> Iterator[Attempt]:
        for task in tasks:
            for number in range(self._settings.group):
                yield Attempt(task, engine, number, self._made.label(step))

    def _save(self) -> None:
        self._trainer.save(
            self._job.checkpoint,
            rewards=self._rewards,
            rates=self._frontier.rates,
            chosen=self._chosen,
        )


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
