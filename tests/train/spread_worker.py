"""What each process of tests/train/test_ranks.py does: some steps, and what came of them into a file."""

import json
import os
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  once for all processes, which are forked from one that has it
import torch

from katcore.schema.sample import Sample
from katcore.settings import LoraSettings, ScaleSettings
from katcore.train import ranks
from katcore.train.lora import add_adapters
from katcore.train.objective import Sft
from katcore.train.trainer import Schedule, Trainer
from tests.train.trees import line, sample, small_model


def samples() -> list[Sample]:
    """Trees and lines of unlike sizes; the first is computed in parts."""
    generator = torch.Generator().manual_seed(0)

    def tokens(num: int) -> list[int]:
        return torch.randint(23, (num,), generator=generator).tolist()

    parents = [-1, *range(9), 4, *range(10, 19), 2, *range(20, 25)]
    tree = sample(tokens(len(parents)), parents, [False, *[True] * (len(parents) - 1)])
    lines = [line(tokens(4 + n), [False, *[True] * (3 + n)]) for n in range(4)]
    return [tree, *lines]


def work(rank: int, world: int, out: Path, settings: dict[str, Any], until: int) -> None:
    """Train; leave metrics, checkpoints and the model. `settings`: of `scale`, and `adapters`, a rank."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "KATCORE_MEET_AT": str(out / f"store-{until}"),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    settings = dict(settings)
    adapters = settings.pop("adapters", 0)
    scale = ScaleSettings(**settings)
    is_by_deepspeed = scale.zero in (1, 2)
    dtype = torch.float32 if is_by_deepspeed else torch.float64
    model = small_model()
    if adapters:
        add_adapters(model, LoraSettings(rank=adapters), seed=1)
    model.to(dtype)
    trainer = Trainer(model, Schedule(1e-2, 9), max_tokens=12, scale=scale)
    passes = [0]
    model.base_model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    trainer.load(out / "checkpoint")
    curve = []
    while trainer.step_number < until:
        metrics = trainer.update(samples(), Sft())
        curve.append([metrics["loss"], metrics["grad_norm"]])
        trainer.save(out / "checkpoint")
    logprobs = trainer.logprobs([line([1, 2, 3, 4], [False, True, True, True])])["r"]
    found = {"curve": curve, "logprobs": logprobs, "passes": ranks.gathered(sum(passes))}
    if ranks.rank() == 0:
        (out / "result.json").write_text(json.dumps(found))
    trainer.publish(out, tokenizer=out)
    ranks.leave()
