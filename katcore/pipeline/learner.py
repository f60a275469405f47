"""One step of reinforcement on rollouts that are there: advantages, old log-probabilities, updates."""

import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from katcore.config import RlSettings
from katcore.pipeline.prefill import engine_passes, trainer_passes
from katcore.schema.call import Sampling
from katcore.schema.sample import Sample
from katcore.train import ranks
from katcore.train.advantage import Advantages, group_advantages, no_advantage, penalised
from katcore.train.mcla import Passes, averaged, common_share, noises, variance
from katcore.train.surrogate import Clipped, Correction, PerToken, PolicyGradient, Reference
from katcore.train.trainer import Trainer

Run = Callable[..., Awaitable[Any]]
"""Calls its first argument with the others."""


async def _here(call: Callable[..., Any], *given: Any) -> Any:
    return call(*given)


class Learner:
    """Changes the trainer's weights as the settings say.

    `engine` made the rollouts, with the weights as they are. Where it has to read them again (`mcla`), it is
    given at most `at_once` requests at a time; then it is done. Of several processes the first alone has it.
    `run` has the trainer compute. With `kl`, `reference` is the model that is not to be left.
    """

    def __init__(  # noqa: PLR0913  what a step needs
        self,
        trainer: Trainer,
        settings: RlSettings,
        engine: object | None,
        *,
        seed: int,
        at_once: int,
        run: Run = _here,
        reference: Any = None,
    ) -> None:
        self._trainer = trainer
        self._settings = settings
        self._engine = engine
        self._run = run
        self._seed = seed
        self._at_once = at_once
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
        self._reference = Reference(reference, settings.temperature) if settings.kl else None

    async def learn(self, samples: Sequence[Sample]) -> dict[str, float]:
        """All passes over the samples of one step; the last update's metrics, and the step's.

        `skipped` are all updates that changed nothing.
        """
        settings = self._settings
        advantages = await self._run(self._advantages, samples)
        useful = [sample for sample in samples if sample.rollout_id in advantages]
        metrics = {"num_useful": float(len(useful))}
        if not useful:
            return metrics
        passes = await self._passes(useful)
        old, apart = await self._run(self._before, useful, passes)
        objective = PolicyGradient(
            advantages, self._shape, old=old, apart=apart, reference=self._reference
        )
        if passes and settings.mcla and settings.mcla.passes > 1:
            metrics |= await self._run(self._seen, useful, passes, objective)
        num_skipped = 0.0
        for number in range(settings.epochs * settings.minibatches):
            part = useful[number % settings.minibatches :: settings.minibatches]
            if part:
                update = await self._run(self._trainer.update, part, objective)
                num_skipped += update["skipped"]
                metrics |= update
        return metrics | objective.rates() | {"skipped": num_skipped}

    def _advantages(self, samples: Sequence[Sample]) -> Advantages:
        """Those of the rollouts that something is learnt from."""
        settings = self._settings
        advantages = group_advantages(
            samples, discount=settings.discount, baseline=settings.baseline
        )
        advantages = penalised(advantages, samples, settings.failed_penalty)
        if settings.imitation:
            for sample in samples:
                if sample.reward == 1.0:
                    advantages.setdefault(sample.rollout_id, no_advantage(sample))
        return advantages

    async def _passes(self, samples: Sequence[Sample]) -> Passes | None:
        settings = self._settings
        if not (mcla := settings.mcla):
            return None
        order = random.Random(f"{self._seed}-{self._trainer.step_number}")
        if mcla.place == "trainer":
            passes: Passes = await self._run(
                partial(trainer_passes, order=order),
                self._trainer,
                samples,
                settings.temperature,
                mcla.passes,
            )
            return passes
        passes = {}
        if self._engine:
            passes = await engine_passes(
                self._engine,
                samples,
                Sampling(settings.temperature),
                mcla.passes,
                at_once=self._at_once,
                order=order,
            )
        return ranks.share(passes)

    def _before(
        self, samples: Sequence[Sample], passes: Passes | None
    ) -> tuple[PerToken | None, PerToken | None]:
        """What ratios start from, None for the sampler's own; and log k, if a correction asks for it."""
        settings, mcla = self._settings, self._settings.mcla
        mean = averaged(passes, mcla.mean) if passes and mcla else None
        is_by_trainer = mcla is not None and mcla.place == "trainer"
        sampler = None if is_by_trainer else mean
        if settings.old == "sampler" and settings.correction == "none":
            return sampler, None
        trainer = mean if is_by_trainer else None
        if trainer is None:
            trainer = self._trainer.logprobs(samples, settings.temperature)
        own = sampler or _sampled(samples)
        apart = {
            name: [one - other for one, other in zip(values, own[name], strict=True)]
            for name, values in trainer.items()
        }
        return trainer if settings.old == "trainer" else sampler, apart

    def _seen(
        self, samples: Sequence[Sample], passes: Passes, objective: PolicyGradient
    ) -> dict[str, float]:
        """How large the noise is, what the passes have in common, and what noise alone would clip."""
        found = {"mcla_variance": variance(passes)}
        if self._settings.mcla and self._settings.mcla.place == "engine":
            found["mcla_common"] = common_share(passes, _sampled(samples))
        num = len(next(iter(passes.values())))
        for name, left_in in (("noise_clip_rate", num), ("noise_clip_rate_of_one", 1)):
            found[name] = objective.outside(noises(passes, left_in), samples)
        return found


def _sampled(samples: Sequence[Sample]) -> PerToken:
    """What the sampler said when it drew."""
    return {
        one.rollout_id: [value for value, yes in zip(one.logprobs, one.trained, strict=True) if yes]
        for one in samples
    }


def _correction(settings: RlSettings) -> Correction | None:
    if settings.correction == "none":
        return None
    low, high = settings.correction_range
    return Correction(settings.correction, low, high, weighs=settings.old == "trainer")
