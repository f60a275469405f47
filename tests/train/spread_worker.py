"""What each process of tests/train/test_ranks.py does: some steps, and what came of them into a file."""

import asyncio
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once for all processes, which are forked from one that has it
import torch

from katcore.config import RlSettings
from katcore.pipeline.learner import Learner
from katcore.schema.sample import Sample
from katcore.settings import LoraSettings, OptimizerSettings, ScaleSettings
from katcore.train import ranks
from katcore.train.batch import TreeBatch
from katcore.train.distill import Distillation, Teachers
from katcore.train.lora import add_adapters
from katcore.train.objective import Loss, Metrics, Sft
from katcore.train.scattered import scatter
from katcore.train.trainer import Schedule, Trainer
from tests.train.trees import line, sample, small_model

RL = RlSettings(
    level="token", minibatches=2, epochs=1, kl=0.1, entropy=0.01, old="trainer", correction="icepop",
    mcla={"passes": 2, "place": "trainer"},
)  # fmt: skip
"""Everything that goes through a model: its own log-probabilities, a reference's, and several passes."""

ADAMW = OptimizerSettings(betas=(0.8, 0.9), weight_decay=0.1, max_norm=0.1)
"""Not the defaults, and a norm that clips."""


def samples() -> list[Sample]:
    """Trees and lines of unlike sizes, of two domains; the first is computed in parts."""
    generator = torch.Generator().manual_seed(0)

    def tokens(num: int) -> list[int]:
        return torch.randint(23, (num,), generator=generator).tolist()

    parents = [-1, *range(9), 4, *range(10, 19), 2, *range(20, 25)]
    tree = sample(tokens(len(parents)), parents, [False, *[True] * (len(parents) - 1)])
    lines = [line(tokens(4 + n), [False, *[True] * (3 + n)]) for n in range(4)]
    return [
        replace(
            one,
            rollout_id=f"r{at}",
            domain="de"[at % 2],
            reward=float(at % 2),
            logprobs=tuple(-3.0 * yes for yes in one.trained),
        )
        for at, one in enumerate([tree, *lines])
    ]


class Breaks(Sft):
    """Not finite whenever `is_broken`."""

    def __init__(self, is_broken: Callable[[], bool]) -> None:
        self._is_broken = is_broken

    def on(self, batch: TreeBatch, samples: Sequence[Sample]) -> Loss:
        loss = super().on(batch, samples)
        factor = math.inf if self._is_broken() else 1.0
        return loss._replace(total=lambda terms: loss.total(terms) * factor)


def stepper(trainer: Trainer, objective: str, scale: ScaleSettings) -> Callable[[], Metrics]:
    """What takes a step of an objective."""
    if objective == "rl":
        reference = small_model().to(trainer.model.dtype).requires_grad_(False)
        if scale.zero == 3:
            scatter(reference, scale, beside=trainer.model)
        learner = Learner(trainer, RL, None, seed=0, at_once=1, reference=reference)
        return lambda: asyncio.run(learner.learn(samples()))
    if objective == "sft":
        return lambda: trainer.update(samples(), Sft())
    models = {name: small_model(seed) for seed, name in enumerate("de", 1)}
    if scale.zero == 3:
        for model in models.values():
            scatter(model.requires_grad_(False), scale, beside=trainer.model)
    distillation = Distillation(Teachers(models))
    return lambda: (
        trainer.update(samples(), distillation, by=lambda one: one.domain) | distillation.seen()
    )


def work(rank: int, world: int, out: Path, settings: dict[str, Any], until: int) -> None:
    """Train; leave metrics, checkpoints and the model.

    `settings` are of `scale`, besides the `objective`, `adapters` (a rank), how many steps the last process
    takes before it is `killed`, and the step whose gradient is `broken` in it.
    """
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "KATCORE_MEET_AT": str(out / f"store-{until}-{len(list(out.glob('checkpoint/*')))}"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    settings = dict(settings)
    adapters, killed = settings.pop("adapters", 0), settings.pop("killed", 0)
    objective, broken = settings.pop("objective", "sft"), settings.pop("broken", None)
    scale = ScaleSettings(**settings)
    is_by_deepspeed = scale.zero in (1, 2)
    dtype = torch.float32 if is_by_deepspeed else torch.float64
    model = small_model()
    if adapters:
        add_adapters(model, LoraSettings(rank=adapters), seed=1)
    model.to(dtype)
    trainer = Trainer(model, Schedule(1e-2, 9), max_tokens=12, scale=scale, optimizer=ADAMW)
    passes = [0]
    model.base_model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    step = stepper(trainer, objective, scale)
    if broken is not None:
        breaking = Breaks(lambda: trainer.step_number == broken and rank == world - 1)
        step = lambda: trainer.update(samples(), breaking)  # noqa: E731
    trainer.load(out / "checkpoint")
    curve = []
    while trainer.step_number < until:
        metrics = step()
        metrics.pop("tokens_per_s")
        curve.append(metrics)
        if killed == len(curve) and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.save(out / "checkpoint")
    logprobs = trainer.logprobs([line([1, 2, 3, 4], [False, True, True, True])])["r"]
    weights = trainer.weights()
    found = {"curve": curve, "logprobs": logprobs, "passes": ranks.gathered(sum(passes))}
    found["handed_over"] = {name: float(one.double().sum()) for name, one in weights.items()}
    if ranks.rank() == 0:
        (out / "result.json").write_text(json.dumps(found))
    trainer.publish(out, tokenizer=out)
    ranks.leave()
