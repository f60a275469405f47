"""Stage `rl`: group-relative policy optimisation of an expert on fresh rollouts of its own tasks.

A step's rollouts are made with the weights that the step then changes, in `epochs` passes of `minibatches`
updates each; log-probabilities of the behaviour policy are the sampler's.
"""

import asyncio
import copy
import statistics
from collections.abc import Sequence

from katcore.config import RlSettings
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine
from katcore.pipeline.frontier import Frontier
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
from katcore.schema.expert import Expert
from katcore.schema.rollout import Rollout
from katcore.schema.task import Task
from katcore.train.advantage import group_advantages, no_advantage, penalised
from katcore.train.policy import limit_threads, load_policy, save_policy
from katcore.train.surrogate import Clipped, Correction, PolicyGradient, Reference
from katcore.train.trainer import Schedule, Trainer, engine_options


def run(job: Job) -> dict[str, float]:
    """Write `model/`, `rollouts.jsonl` and `calls.jsonl`."""
    limit_threads(job.preset.expert_threads)
    settings = job.preset.rl
    start = job.input(f"{job.spec.expert}.sft") / "model"
    model = load_policy(start)
    schedule = Schedule(
        settings.lr,
        settings.steps * settings.epochs * settings.minibatches,
        settings.warmup,
        final_lr=settings.final_lr,
    )
    trainer = Trainer(model, schedule, **engine_options(job.preset))
    loop = _Loop(job, trainer, ChatTokenizer(start))
    rewards = asyncio.run(loop.run())
    save_policy(model, job.out / "model", tokenizer=start)
    edge = max(1, len(rewards) // 5)
    return {
        "reward_first": statistics.fmean(rewards[:edge]),
        "reward_last": statistics.fmean(rewards[-edge:]),
    }


class _Loop:
    def __init__(self, job: Job, trainer: Trainer, chat: ChatTokenizer) -> None:
        self._job = job
        self._trainer = trainer
        self._settings = job.preset.rl
        self._expert: Expert = job.plugins.experts()[job.spec.expert]
        self._engine = EmbeddedEngine(trainer.model, chat, **engine_settings(job))
        settings = self._settings
        self._shape = Clipped(
            settings.level,
            settings.mean,
            settings.clip_low,
            settings.clip_high,
            settings.temperature,
            kl=settings.kl,
            entropy=settings.entropy,
            imitation=settings.imitation,
            correction=_correction(settings),
        )
        self._reference = None
        if settings.kl:
            self._reference = Reference(copy.deepcopy(trainer.model), settings.temperature)

    async def run(self) -> list[float]:
        """All steps; mean reward of each. Goes on from the last checkpoint."""
        settings, job = self._settings, self._job
        saved = self._trainer.load(job.checkpoint)
        rewards: list[float] = list(saved.get("rewards", []))
        tasks = tasks_of(job, self._expert, "train")
        frontier = Frontier(tasks, job.seed + 17, saved.get("rates"))
        sampling = Sampling(settings.temperature, job.preset.max_new_tokens)
        file = RolloutFile(job.out / "rollouts.jsonl")
        async with open_rollouts(job) as rollouts:
            parts = rollouts.parts(self._expert, sampling)
            for step in range(len(rewards), settings.steps):
                self._engine.weights_changed(str(step))
                chosen = frontier.choose(settings.prompts, step)
                made = await self._make(rollouts, parts, chosen, step)
                for rollout in made:
                    file.append(rollout)
                frontier.learn(made)
                metrics = self._learn(made) | {"pass_rate": frontier.pass_rate}
                rewards.append(metrics["reward"])
                job.progress.step(step, settings.steps, metrics)
                if (step + 1) % settings.checkpoint_every == 0:
                    self._trainer.save(job.checkpoint, rewards=rewards, rates=frontier.rates)
        file.close()
        return rewards

    async def _make(
        self, rollouts: Rollouts, parts: Parts, tasks: Sequence[Task], step: int
    ) -> list[Rollout]:
        attempts = (
            Attempt(task, self._engine, number, f"rl-{step}")
            for task in tasks
            for number in range(self._settings.group)
        )
        return [rollout async for rollout in rollouts.run(attempts, parts)]

    def _learn(self, rollouts: list[Rollout]) -> dict[str, float]:
        settings = self._settings
        samples = samples_of(self._job, self._expert, rollouts)
        advantages = group_advantages(samples, discount=settings.discount)
        advantages = penalised(advantages, samples, settings.failed_penalty)
        if settings.imitation:
            for sample in samples:
                if sample.reward == 1.0:
                    advantages.setdefault(sample.rollout_id, no_advantage(sample))
        useful = [sample for sample in samples if sample.rollout_id in advantages]
        old = None
        if settings.old == "trainer":
            old = self._trainer.logprobs(useful, settings.temperature)
        objective = PolicyGradient(advantages, self._shape, old=old, reference=self._reference)
        metrics: dict[str, float] = {}
        for number in range(settings.epochs * settings.minibatches):
            part = useful[number % settings.minibatches :: settings.minibatches]
            if part:
                metrics = self._trainer.update(part, objective)
        scored = [rollout.reward for rollout in rollouts if rollout.reward is not None]
        turns = [len(rollout.trajectory.turns) for rollout in rollouts]
        return (
            metrics
            | objective.rates()
            | {
                "reward": statistics.fmean(scored) if scored else 0.0,
                "num_useful": float(len(useful)),
                "turns": statistics.fmean(turns),
                "failed": statistics.fmean(len(sample.failed) for sample in samples),
            }
        )


def _correction(settings: RlSettings) -> Correction | None:
    if settings.correction == "none":
        return None
    return Correction(settings.correction, *settings.correction_range)
