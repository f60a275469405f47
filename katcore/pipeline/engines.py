"""The engines that make rollouts, and how weights come to them: `serve` of the settings."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from katcore.config import check_finished
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine, open_engine
from katcore.inference.router import Replica, Router
from katcore.pipeline.rollouts import engine_settings
from katcore.pipeline.stage import Job
from katcore.train import ranks
from katcore.train.policy import save_policy
from katcore.train.prepare import load_sampler

Weights = Mapping[str, Any]
"""Tensors, by their names in the model."""
HandOver = Callable[[str, Weights], Awaitable[None]]


class Engines:
    """One engine over all replicas. `hand_over` gives them weights under a version."""

    def __init__(self, engine: Router, hand_over: HandOver, *, is_colocated: bool) -> None:
        self.engine = engine
        self.hand_over = hand_over
        self._is_colocated = is_colocated

    async def make_room(self) -> None:
        """The trainer is about to step: engines that share its GPUs sleep until they get its weights."""
        if self._is_colocated:
            await self.engine.sleep()


@asynccontextmanager
async def open_engines(job: Job, model: Any, start: Path) -> AsyncIterator[Engines]:
    """The engines of a training of `model`, which began as what is in the folder `start`."""
    serve = job.preset.serve
    if serve.engine == "vllm":
        router, hand_over = _servers(job, model, start)
    else:
        router, hand_over = _embedded(job, model, start)
    try:
        await router.open(job.progress.say)
        yield Engines(router, hand_over, is_colocated=serve.placement == "colocated")
    finally:
        await router.close()


@asynccontextmanager
async def open_finished(job: Job, folder: Path, version: str) -> AsyncIterator[Router]:
    """Engines with the model of a folder, which nobody trains.

    Servers that run elsewhere read it from there, as `version`.

    Raises:
        ConfigError: they are servers for adapters.
    """
    serve = job.preset.serve
    check_finished(serve, job.preset.lora)
    if serve.engine == "vllm":
        numbers = range(serve.replicas)
        router = Router([_server(job, folder, number, is_trained=False) for number in numbers])
    else:
        device = ranks.device(job.preset.scale.device)
        router = Router([open_engine(folder, **engine_settings(job), device=device)])
    try:
        await router.open(job.progress.say)
        if serve.urls:
            await router.renew(lambda engine: engine.load_weights(folder, version))
        yield router
    finally:
        await router.close()


def _embedded(job: Job, model: Any, start: Path) -> tuple[Router, HandOver]:
    """Engines in this process, with the trainer's very weights or, disaggregated, with copies.

    They have copies, too, where no process has all weights.
    """
    serve = job.preset.serve
    is_shared = serve.placement == "colocated" and job.preset.scale.zero < 3
    chat = ChatTokenizer(start)
    router = Router(
        [
            EmbeddedEngine(
                model if is_shared else load_sampler(start, job.preset, job.seed),
                chat,
                **engine_settings(job) | {"seed": job.seed + number},
            )
            for number in range(serve.replicas)
        ]
    )

    async def hand_over(version: str, weights: Weights) -> None:
        async def change(engine: EmbeddedEngine) -> None:
            if is_shared:
                engine.weights_changed(version)
            else:
                await engine.copy_weights(weights, version)

        await router.renew(change)

    return router, hand_over


def _servers(job: Job, model: Any, start: Path) -> tuple[Router, HandOver]:
    """Engines on vLLM servers, which read the weights from a folder of the stage's work.

    They are written in bfloat16 where all servers compute in it: each would round them itself.
    """
    replicas = [_server(job, start, number) for number in range(job.preset.serve.replicas)]
    router = Router(replicas)
    root = job.work / "weights"

    async def hand_over(version: str, weights: Weights) -> None:
        folder = root / version
        is_narrow = all(getattr(one, "precision", "") == "bfloat16" for one in replicas)
        await asyncio.to_thread(_write, job, model, weights, folder, start, is_narrow=is_narrow)
        await router.renew(lambda engine: engine.load_weights(folder, version))
        for old in root.iterdir():
            if old != folder:
                await asyncio.to_thread(shutil.rmtree, old)

    return router, hand_over


def _write(
    job: Job, model: Any, weights: Weights, folder: Path, start: Path, *, is_narrow: bool
) -> None:
    """What servers need of the weights: the adapters, if these alone are trained."""
    if job.preset.lora:
        import_module("katcore.train.lora").save_adapter(model, folder, weights)
    else:
        save_policy(model, folder, tokenizer=start, weights=weights, in_bfloat16=is_narrow)


def _server(job: Job, start: Path, number: int, *, is_trained: bool = True) -> Replica:
    serve, lora = job.preset.serve, job.preset.lora
    options = {"model": start, "context": job.preset.model.context, **serve.options}
    if serve.urls:
        options["url"] = serve.urls[number]
    else:
        options |= {
            "tensor_parallel_size": serve.tensor_parallel,
            "devices": serve.devices_of(number, job.preset.scale.gpus),
            "seed": job.seed + number,
        }
        if is_trained:
            options |= {
                "takes_weights": lora is None,
                "adapter_rank": lora.rank if lora else 0,
                "sleeps": serve.placement == "colocated",
            }
    engine: Replica = job.plugins.make("engine", "vllm", options)
    return engine
