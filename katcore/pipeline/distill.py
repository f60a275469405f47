"""Stage `distill`: fuse the experts into the student, on the student's own rollouts.

Each task's teacher is the expert of its domain; what the student says is scored by the whole vocabulary of
the teacher's distribution (reverse KL). It may begin off policy, on the teachers' own last rollouts: with the
whole vocabulary in the loss they need no other objective. Rewards are recorded but not trained on, so only
the agent's part of a rollout is needed for the loss, and the verdict for the curve.
"""

import asyncio
import statistics
from collections.abc import Sequence

from katcore.config import DistillSettings
from katcore.errors import StageError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine
from katcore.pipeline.rollouts import (
    RolloutFile,
    Rollouts,
    engine_settings,
    open_rollouts,
    samples_of,
    tasks_of,
)
from katcore.pipeline.stage import Job
from katcore.rollout.single import Attempt, Parts
from katcore.schema.call import Sampling
from katcore.schema.codec import read_lines
from katcore.schema.expert import Expert
from katcore.schema.rollout import Rollout
from katcore.schema.sample import Sample
from katcore.schema.task import Task
from katcore.train.distill import Teachers
from katcore.train.objective import ReverseKl
from katcore.train.policy import limit_threads, load_policy, save_policy
from katcore.train.sft import draw
from katcore.train.trainer import Schedule, Trainer, engine_options


def run(job: Job) -> dict[str, float]:
    """Write `model/`, `rollouts.jsonl` and `calls.jsonl`."""
    limit_threads(job.preset.shared_threads)
    settings = job.preset.distill
    start = job.input("unified.sft") / "model"
    model = load_policy(start)
    updates = settings.cold_steps + settings.steps * settings.epochs
    schedule = Schedule(settings.lr, updates, settings.warmup, settings.final_lr)
    trainer = Trainer(model, schedule, **engine_options(job.preset))
    loop = _Loop(job, trainer, ChatTokenizer(start))
    history = loop.load()
    loop.learn_from_teachers()
    asyncio.run(loop.run(history))
    save_policy(model, job.out / "model", tokenizer=start)
    return {"kl_first": history[0], "kl_last": history[-1]}


class _Loop:
    def __init__(self, job: Job, trainer: Trainer, chat: ChatTokenizer) -> None:
        self._job = job
        self._trainer = trainer
        self._settings = job.preset.distill
        experts = job.plugins.experts()
        names = [name.removesuffix(".rl") for name in job.inputs if name.endswith(".rl")]
        self._experts: list[Expert] = [experts[name] for name in names]
        teachers = {name: load_policy(job.input(f"{name}.rl") / "model") for name in names}
        self._objective = ReverseKl(Teachers(teachers))
        self._engine = EmbeddedEngine(trainer.model, chat, **engine_settings(job))

    def load(self) -> list[float]:
        """Go on from the last checkpoint: the mean KL of each on-policy step so far."""
        return list(self._trainer.load(self._job.checkpoint).get("history", []))

    def learn_from_teachers(self) -> None:
        """The off-policy beginning: the same loss, on states that the teachers came to."""
        settings, job = self._settings, self._job
        if self._trainer.step_number >= settings.cold_steps:
            return
        pools = [_late_samples(job, expert) for expert in self._experts]
        while (step := self._trainer.step_number) < settings.cold_steps:
            rows = [
                pool[at]
                for expert, pool in zip(self._experts, pools, strict=True)
                for at in draw(len(pool), self._share(expert).cold_batch, job.seed + 31, step)
            ]
            metrics = self._update(rows)
            job.progress.step(step, settings.cold_steps + settings.steps, metrics)
            if (step + 1) % settings.checkpoint_every == 0:
                self._trainer.save(job.checkpoint, history=[])

    async def run(self, history: list[float]) -> None:
        """The steps on policy; `history` grows by the mean KL of each."""
        settings, job = self._settings, self._job
        tasks = {expert.name: tasks_of(job, expert, "train") for expert in self._experts}
        sampling = Sampling(settings.temperature, job.preset.max_new_tokens)
        file = RolloutFile(job.out / "rollouts.jsonl")
        async with open_rollouts(job) as rollouts:
            parts = {expert.name: rollouts.parts(expert, sampling) for expert in self._experts}
            for step in range(len(history), settings.steps):
                self._engine.weights_changed(str(step))
                made: dict[str, list[Rollout]] = {}
                for expert in self._experts:
                    own, num = tasks[expert.name], self._share(expert).prompts
                    chosen = [own[at] for at in draw(len(own), num, job.seed + 29, step)]
                    made[expert.name] = await self._make(rollouts, parts[expert.name], chosen, step)
                    for rollout in made[expert.name]:
                        file.append(rollout)
                metrics = self._learn(made)
                history.append(metrics["kl"])
                done, total = settings.cold_steps + step, settings.cold_steps + settings.steps
                job.progress.step(done, total, metrics)
                if (step + 1) % settings.checkpoint_every == 0:
                    self._trainer.save(job.checkpoint, history=history)
        file.close()

    def _share(self, expert: Expert) -> DistillSettings:
        return self._job.preset.for_expert(expert.name).distill

    async def _make(
        self, rollouts: Rollouts, parts: Parts, tasks: Sequence[Task], step: int
    ) -> list[Rollout]:
        attempts = (Attempt(task, self._engine, 0, f"distill-{step}") for task in tasks)
        return [rollout async for rollout in rollouts.run(attempts, parts)]

    def _learn(self, made: dict[str, list[Rollout]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        samples: list[Sample] = []
        for expert in self._experts:
            rollouts = made[expert.name]
            samples += samples_of(self._job, expert, rollouts)
            rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
            metrics[f"reward/{expert.name}"] = statistics.fmean(rewards) if rewards else 0.0
        updates = [self._update(samples) for _ in range(self._settings.epochs)]
        return metrics | updates[0]

    def _update(self, samples: Sequence[Sample]) -> dict[str, float]:
        update = self._trainer.update(samples, self._objective, by=_domain)
        return {"kl": update["loss"], "grad_norm": update["grad_norm"], "lr": update["lr"]}


def _late_samples(job: Job, expert: Expert) -> list[Sample]:
    """Samples of the second half of the rollouts that made the teacher.

    Those that failed too: what the teacher does when a try did not help is half of what it can do.
    """
    rollouts = list(read_lines(Rollout, job.input(f"{expert.name}.rl") / "rollouts.jsonl"))
    samples = samples_of(job, expert, rollouts[len(rollouts) // 2 :])
    if not samples:
        raise StageError(f"{expert.name}.rl left no scored rollout to begin with")
    return samples


def _domain(sample: Sample) -> str:
    return sample.domain
