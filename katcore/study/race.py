"""The same reinforcement from the same model, with one engine's noise, by each way to handle it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from katcore.config import RlSettings
from katcore.inference.cache import Recording
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine
from katcore.pipeline.learner import Learner
from katcore.schema.call import EngineRequest, Generation, ScoreRequest
from katcore.schema.sample import Sample
from katcore.study.sorting import Sorting
from katcore.train.moe import copy_weights, engine_copy
from katcore.train.replay import Recorder
from katcore.train.trainer import Schedule, Trainer

_ROOM: Mapping[str, Any] = {"num_slots": 128, "context": 64}


@dataclass(frozen=True, slots=True)
class Way:
    """What differs from a clipped product of ratios by turn, with old log-probabilities as they were drawn.

    With `replays` the trainer sends tokens to the experts that the engine sent them to (`train.replay`).
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    replays: bool = False


WAYS = {
    "one pass": Way(),
    "mean of 8": Way({"mcla": {"passes": 8}}),
    "trainer": Way({"old": "trainer"}),
    "TIS": Way({"old": "trainer", "correction": "truncate", "correction_range": (0.5, 2.0)}),
    "IcePop": Way({"old": "trainer", "correction": "icepop"}),
    "mean of 8 + IcePop": Way({"mcla": {"passes": 8}, "correction": "icepop"}),
    "GSPO": Way({"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}),
    "replay": Way(replays=True),
    "replay + trainer": Way({"old": "trainer"}, replays=True),
}


@dataclass(frozen=True, slots=True)
class Source:
    """An engine's noise: its precision, how far what its routers read is shaken, and what it says wrong.

    `sigma` is the deviation of normal noise on the log-probabilities that it gives; what it draws is right.
    """

    is_bfloat16: bool = False
    jitter: float = 0.0
    sigma: float = 0.0


SOURCES = {
    "float32": Source(),
    "injected, sd 0.3": Source(sigma=0.3),
    "bfloat16, jitter 0.6": Source(is_bfloat16=True, jitter=0.6),
    "bfloat16": Source(is_bfloat16=True),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a run. The learning rate stays as it is."""

    steps: int = 60
    prompts: int = 16
    group: int = 8
    epochs: int = 2
    minibatches: int = 2
    lr: float = 2e-4
    every: int = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """One of `SOURCES`, one of `WAYS`, and the seed of prompts and draws."""

    source: str
    way: str
    seed: int


@dataclass(frozen=True, slots=True)
class Run:
    """What came of an entry.

    `rewards` are those of each step's rollouts. `learnt` are those of answers to held-out prompts, drawn from
    the trainer's weights without noise, after every `Shape.every` steps; `greedy` is after the last step.
    """

    entry: Entry
    rewards: list[float]
    learnt: list[float]
    greedy: float
    metrics: list[dict[str, float]]

    @property
    def last(self) -> float:
        """The reward of the last fifth of the steps."""
        return _end(self.rewards)

    @property
    def end(self) -> float:
        """What the trainer's weights had learnt, over the last fifth of the steps."""
        return _end(self.learnt)


class NoisyEngine(EmbeddedEngine):
    """Adds normal noise of deviation `sigma`, new each time, to the log-probabilities that it gives."""

    def __init__(
        self, model: Any, chat: ChatTokenizer, recording: Recording | None, sigma: float, seed: int
    ) -> None:
        super().__init__(model, chat, seed=seed, recording=recording, **_ROOM)
        self._sigma = sigma
        self._gauss = random.Random(seed).gauss

    async def generate(self, request: EngineRequest) -> Generation:
        """See `Engine.generate`."""
        made = await super().generate(request)
        return replace(made, logprobs=self._shaken(made.logprobs))

    async def score(self, request: ScoreRequest) -> tuple[float, ...]:
        """See `SupportsScore.score`."""
        return self._shaken(await super().score(request))

    def _shaken(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value + self._gauss(0.0, self._sigma) for value in values)


async def race(
    model: Any, task: Sorting, entry: Entry, shape: Shape, step: Callable[[], None]
) -> Run:
    """Reinforce a copy of `model`; `step` is told of each step."""
    trained = engine_copy(model, is_bfloat16=False, jitter=0.0, seed=0)
    noise, way, seed = SOURCES[entry.source], WAYS[entry.way], entry.seed
    sampler = engine_copy(model, is_bfloat16=noise.is_bfloat16, jitter=noise.jitter, seed=seed)
    recorder = Recorder(sampler, **_ROOM) if way.replays else None
    engine = NoisyEngine(sampler, task.chat, recorder, noise.sigma, seed)
    exact = EmbeddedEngine(trained, task.chat, seed=seed, **_ROOM)
    settings = rl_settings(entry.way, shape)
    schedule = Schedule(shape.lr, shape.steps * shape.epochs * shape.minibatches, final_lr=1.0)
    trainer = Trainer(trained, schedule)
    learner = Learner(trainer, settings, engine, seed=seed, at_once=128)
    order, held_out = random.Random(seed), task.prompts(256, random.Random(7))
    run = Run(entry, [], [], 0.0, [])
    for number in range(1, shape.steps + 1):
        copy_weights(trained, sampler)
        engine.weights_changed(str(number))
        prompts = task.prompts(shape.prompts, order)
        samples = await task.attempt(engine, prompts, shape.group, settings.temperature)
        run.rewards.append(_mean(samples))
        trainer.replay(recorder.take() if recorder else None)
        run.metrics.append(await learner.learn(samples))
        exact.weights_changed(str(number))
        if number % shape.every == 0 or number == shape.steps:
            run.learnt.append(_mean(await task.attempt(exact, held_out, 1, 1.0)))
        step()
    return replace(run, greedy=_mean(await task.attempt(exact, held_out, 1, 0.0)))


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
    return RlSettings.model_validate({**given, **WAYS[way].settings})


def _mean(samples: Sequence[Sample]) -> float:
    return fmean(one.reward or 0.0 for one in samples)


def _end(values: Sequence[float]) -> float:
    """Of the last fifth."""
    return fmean(values[-max(1, len(values) // 5) :])
