"""The same reinforcement from the same model, with one engine's noise, by each way to handle it."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from katcore.config import RlSettings
from katcore.inference.embedded import EmbeddedEngine
from katcore.pipeline.learner import Learner
from katcore.study.sorting import Sorting
from katcore.train.moe import copy_weights, engine_copy
from katcore.train.trainer import Schedule, Trainer

WAYS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "mean of 8": {"mcla": {"passes": 8}},
    "trainer": {"old": "trainer"},
    "TIS": {"old": "trainer", "correction": "truncate", "correction_range": (0.5, 2.0)},
    "IcePop": {"old": "trainer", "correction": "icepop"},
    "mean of 8 + IcePop": {"mcla": {"passes": 8}, "correction": "icepop"},
    "GSPO": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
}
"""What differs from the clipped product of a turn's ratios, with old log-probabilities as they were drawn."""


@dataclass(frozen=True, slots=True)
class Source:
    """An engine's noise: its precision, and how far what its routers read is shaken."""

    is_bfloat16: bool = False
    jitter: float = 0.0


SOURCES = {
    "float32": Source(),
    "bfloat16": Source(is_bfloat16=True),
    "bfloat16, jitter 0.3": Source(is_bfloat16=True, jitter=0.3),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a run. The learning rate stays as it is."""

    steps: int = 40
    prompts: int = 16
    group: int = 8
    epochs: int = 2
    minibatches: int = 2
    lr: float = 5e-4


@dataclass(frozen=True, slots=True)
class Entry:
    """One of `SOURCES`, one of `WAYS`, and the seed of prompts and draws."""

    source: str
    way: str
    seed: int


@dataclass(frozen=True, slots=True)
class Run:
    """What came of an entry: each step's reward, and that of greedy answers to held-out prompts after it."""

    entry: Entry
    rewards: list[float]
    greedy: float
    metrics: list[dict[str, float]]

    @property
    def first(self) -> float:
        """The reward of the first fifth of the steps."""
        return fmean(self.rewards[: max(1, len(self.rewards) // 5)])

    @property
    def last(self) -> float:
        """The reward of the last fifth of the steps."""
        return fmean(self.rewards[-max(1, len(self.rewards) // 5) :])


async def race(
    model: Any, task: Sorting, entry: Entry, shape: Shape, step: Callable[[], None]
) -> Run:
    """Reinforce a copy of `model`; `step` is told of each step."""
    trained = engine_copy(model, is_bfloat16=False, jitter=0.0, seed=0)
    noise, seed = SOURCES[entry.source], entry.seed
    sampler = engine_copy(model, is_bfloat16=noise.is_bfloat16, jitter=noise.jitter, seed=seed)
    engine = EmbeddedEngine(sampler, task.chat, num_slots=128, context=64, seed=seed)
    settings = rl_settings(entry.way, shape)
    schedule = Schedule(shape.lr, shape.steps * shape.epochs * shape.minibatches, final_lr=1.0)
    trainer = Trainer(trained, schedule)
    learner = Learner(trainer, settings, engine, seed=seed, at_once=128)
    order = random.Random(seed)
    rewards: list[float] = []
    metrics: list[dict[str, float]] = []
    for number in range(shape.steps):
        copy_weights(trained, sampler)
        engine.weights_changed(str(number))
        prompts = task.prompts(shape.prompts, order)
        samples = await task.attempt(engine, prompts, shape.group, settings.temperature)
        rewards.append(fmean(one.reward or 0.0 for one in samples))
        metrics.append(await learner.learn(samples))
        step()
    exact = EmbeddedEngine(trained, task.chat, num_slots=128, context=64, seed=seed)
    held_out = task.prompts(256, random.Random(7))
    final = await task.attempt(exact, held_out, 1, 0.0)
    return Run(entry, rewards, fmean(one.reward or 0.0 for one in final), metrics)


def rl_settings(way: str, shape: Shape) -> RlSettings:
    """The settings of one of `WAYS`."""
    given: Mapping[str, Any] = {
        "level": "turn",
        "discount": 1.0,
        "epochs": shape.epochs,
        "minibatches": shape.minibatches,
        "clip_low": 0.2,
        "clip_high": 0.28,
    }
    return RlSettings.model_validate({**given, **WAYS[way]})
