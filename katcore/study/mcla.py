"""`kat study mcla`: what averaging log-probabilities does for a mixture of experts, where the truth is known.

A tiny Qwen3-MoE is trained from scratch to sort digits, until it does so sometimes. Then:

1. the noise of engines (bfloat16, batches that differ, routers that are shaken) and noise of known size are
   measured against the trainer's float32, one pass and means of up to 16;
2. the model is reinforced with each engine by each way of handling its noise.

What is asked, and what would be an answer, is in docs/explanation/mcla.md.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from katcore.errors import ConfigError
from katcore.inference.embedded import EmbeddedEngine
from katcore.pipeline.prefill import engine_passes
from katcore.schema.call import Sampling
from katcore.study.kept import Kept
from katcore.study.noise import COUNTS, Noise, drawn_with, injected, measured
from katcore.study.race import SOURCES, WAYS, Entry, Run, Shape, race, rl_settings
from katcore.study.sorting import Sorting, sorting
from katcore.train.moe import engine_copy, new_moe
from katcore.train.objective import Sft
from katcore.train.policy import limit_threads
from katcore.train.surrogate import Clipped, PolicyGradient
from katcore.train.trainer import Schedule, Trainer

INJECTED = ((0.03, 0.0), (0.1, 0.0), (0.1, 0.25), (0.1, 0.9), (0.3, 0.0))
"""Deviation, and the share that all passes have in common."""

ENGINES = {name: source for name, source in SOURCES.items() if not source.sigma}
"""Those whose noise is measured; that of others is among `INJECTED`."""

ALL_WAYS = tuple(WAYS)


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is done. `base_steps` are the steps of fine-tuning before anything is measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    base_steps: int = 60
    base_batch: int = 64
    digits: int = 6
    samples: int = 128
    ways: tuple[str, ...] = ALL_WAYS
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        """Refuse ways that are not there."""
        if unknown := [way for way in self.ways if way not in WAYS]:
            raise ConfigError(f"no way named {unknown[0]!r}; choose from: {', '.join(WAYS)}")

    @property
    def entries(self) -> list[Entry]:
        """The runs; with the engine that has no noise one pass alone, to compare with.

        Nothing is replayed of an engine whose routers are as they should be.
        """
        calm, *noisy = SOURCES
        lanes = [(calm, "one pass")]
        for source, way in itertools.product(noisy, self.ways):
            if source in ENGINES or not WAYS[way].replays:
                lanes.append((source, way))
        return [Entry(source, way, seed) for source, way in lanes for seed in self.seeds]

    @property
    def num_steps(self) -> int:
        """How many times a progress bar moves."""
        measures = len(ENGINES) + len(INJECTED)
        return self.base_steps + measures + len(self.entries) * self.shape.steps


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    settings: Settings
    base_greedy: float
    noises: list[Noise]
    runs: list[Run]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)

    def of(self, source: str, way: str) -> list[Run]:
        """The runs that differ in their seed alone."""
        return [run for run in self.runs if (run.entry.source, run.entry.way) == (source, way)]

    def rows(self) -> Iterator[tuple[str, ...]]:
        """For each engine and way: the last fifth, what was learnt, by seed, greedy, what was clipped."""
        for source, way in dict.fromkeys((run.entry.source, run.entry.way) for run in self.runs):
            runs = self.of(source, way)
            clipped = [
                step["clip_rate"] for run in runs for step in run.metrics if "clip_rate" in step
            ]
            yield (
                source,
                way,
                f"{fmean(run.last for run in runs):.3f}",
                f"{fmean(run.end for run in runs):.3f}",
                " ".join(f"{run.end:.2f}" for run in runs),
                f"{fmean(run.greedy for run in runs):.3f}",
                f"{fmean(clipped):.1%}" if clipped else "",
            )

    def verdict(self, source: str) -> str:
        """What the page asked beforehand of the runs with one engine."""
        one, mean = self.of(source, "one pass"), self.of(source, "mean of 8")
        calm = self.of("float32", "one pass")
        if not (one and mean and calm):
            return "not run"
        lost = [quiet.end - run.end for quiet, run in zip(calm, one, strict=True)]
        kept = [better.end - run.end for better, run in zip(mean, one, strict=True)]
        if min(lost) <= 0.05:
            return "one pass did not degrade in every seed: nothing to keep"
        return "kept" if min(kept) > 0 else "not kept in every seed"


async def run(settings: Settings, step: Callable[[str], None], folder: Path) -> Report:
    """Train, measure, reinforce. `step` is told what is at work; `folder` keeps the runs that are done."""
    limit_threads(1)
    task = sorting(settings.digits)
    model = _base(task, settings, step)
    exact = EmbeddedEngine(model, task.chat, num_slots=128, context=64)
    held_out = task.prompts(256, random.Random(7))
    greedy = fmean(
        one.reward or 0.0 for one in await task.attempt(exact, held_out, 1, temperature=0.0)
    )
    found = await _noises(model, task, settings, step)
    kept = Kept(folder, replace(settings, seeds=(), ways=(), samples=0))
    runs = []
    for entry in settings.entries:
        told = partial(step, f"{entry.source}, {entry.way}, seed {entry.seed}")
        made = kept.read(entry)
        if made:
            for _ in range(settings.shape.steps):
                told()
        else:
            made = await race(model, task, entry, settings.shape, told)
            kept.write(made)
        runs.append(made)
    return Report(settings, greedy, found, runs)


def _base(task: Sorting, settings: Settings, step: Callable[[str], None]) -> Any:
    """A model that sorts sometimes."""
    chat = task.chat
    model = new_moe(vocabulary=chat.vocabulary, end_id=chat.end_id, seed=0)
    trainer = Trainer(model, Schedule(3e-3, settings.base_steps, 20, 0.1))
    order = random.Random(0)
    for _ in range(settings.base_steps):
        step("fine-tuning from scratch")
        prompts = task.prompts(settings.base_batch, order)
        trainer.update([task.demonstration(prompt) for prompt in prompts], Sft())
    return model


async def _noises(
    model: Any, task: Sorting, settings: Settings, step: Callable[[str], None]
) -> list[Noise]:
    trainer = Trainer(model, Schedule(0.0, 1))
    found = []
    for name, source in ENGINES.items():
        step(f"noise of {name}")
        sampler = engine_copy(model, is_bfloat16=source.is_bfloat16, jitter=source.jitter, seed=1)
        engine = EmbeddedEngine(sampler, task.chat, num_slots=64, context=64, seed=1)
        prompts = task.prompts(settings.samples, random.Random(3))
        samples = await task.attempt(engine, prompts, 1, 1.0)
        passes = await engine_passes(
            engine, samples, Sampling(1.0), COUNTS[-1], at_once=64, order=random.Random(5)
        )
        objective = _turns([one.rollout_id for one in samples])
        found.append(measured(name, samples, passes, trainer.logprobs(samples), objective))
    exact = EmbeddedEngine(model, task.chat, num_slots=64, context=64, seed=1)
    samples = await task.attempt(exact, task.prompts(settings.samples, random.Random(3)), 1, 1.0)
    truth = trainer.logprobs(samples)
    for sigma, rho in INJECTED:
        name = f"injected, sd {sigma}, rho {rho}"
        step(f"noise {name}")
        passes, noisy = injected(truth, sigma, rho, seed=2), drawn_with(samples, sigma, seed=3)
        objective = _turns([one.rollout_id for one in samples])
        found.append(measured(name, noisy, passes, truth, objective))
    return found


def _turns(names: Sequence[str]) -> PolicyGradient:
    settings = rl_settings("one pass", Shape())
    shape = Clipped("turn", "rollout", settings.clip_low, settings.clip_high)
    return PolicyGradient(dict.fromkeys(names, ((1.0,),)), shape)
