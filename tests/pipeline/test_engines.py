"""The engines of a training: which weights they have, and when."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from katcore.config import LoraSettings, ModelSettings, Preset
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine
from katcore.pipeline.engines import open_engines
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.progress import Progress
from katcore.pipeline.stage import Job
from katcore.plugin import Plugins
from katcore.serving import ServeSettings
from katcore.settings import ScaleSettings
from katcore.train import scattered
from katcore.train.prepare import load_sampler, load_trainable
from katcore.train.trainer import Schedule, Trainer
from tests.inference.fake_vllm import FakeVllm
from tests.inference.tiny import CONTEXT, request, write_tiny_model

PROMPT = (9, 31, 77)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("start"))


SCATTERED = ScaleSettings(zero=3)


def a_job(root: Path, serve: ServeSettings, **given: Any) -> Job:
    spec = StageSpec("rl", "rl")
    model = ModelSettings(context=CONTEXT)
    preset = Preset(name="p", summary="", concurrency=4, model=model, serve=serve, **given)
    progress = Progress(spec, root, Plan(preset, 0, (), {"rl": spec}, {"rl": "k"}))
    return Job(spec, preset, 0, Plugins.installed(), {}, root, root, progress)


async def greedy(model: Any, start: Path) -> tuple[int, ...]:
    engine = EmbeddedEngine(model, ChatTokenizer(start), num_slots=1, context=CONTEXT)
    return (await engine.generate(request("s", PROMPT))).ids


async def step_and_ask(job: Job, start: Path) -> None:
    """Two steps of a trainer: what is said after the first hand-over, and after the second."""
    trainer = Trainer(
        load_trainable(start, job.preset, 0), Schedule(0.0, 1), scale=job.preset.scale
    )
    model, sampler = trainer.model, load_sampler(start, job.preset, 0)
    first = await greedy(sampler, start)
    async with open_engines(job, model, start) as engines:

        async def said() -> tuple[set[tuple[int, ...]], set[str]]:
            made = [await engines.engine.generate(request(f"s{n}", PROMPT)) for n in range(6)]
            return {one.ids for one in made}, {one.policy_version for one in made}

        await engines.hand_over("0", trainer.weights())
        assert await said() == ({first}, {"0"})
        await engines.make_room()
        with torch.no_grad():
            layers = scattered.of(model)
            for weight in [*model.parameters(), *(layers.shards if layers else [])]:
                if weight.requires_grad:
                    weight += 0.3
        if job.preset.serve.placement == "disaggregated":
            assert await said() == ({first}, {"0"}), "the trainer's step is not seen yet"
        await engines.hand_over("1", trainer.weights())
        for name, weight in sampler.named_parameters():
            weight.requires_grad_(False).add_(0.3 if not job.preset.lora or "lora" in name else 0.0)
        second = await greedy(sampler, start)
        assert await said() == ({second}, {"1"})
        assert first != second


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all", "adapters"])
@pytest.mark.parametrize("scale", [ScaleSettings(), SCATTERED], ids=["whole", "scattered"])
@pytest.mark.parametrize("placement", ["colocated", "disaggregated"])
async def test_embedded_ones_have_the_trainer_s_weights_or_copies(
    start: Path, tmp_path: Path, placement: Any, scale: ScaleSettings, lora: LoraSettings | None
) -> None:
    serve = ServeSettings(replicas=2, placement=placement)
    await step_and_ask(a_job(tmp_path, serve, scale=scale, lora=lora), start)


@pytest.mark.parametrize("scale", [ScaleSettings(), SCATTERED], ids=["whole", "scattered"])
async def test_servers_read_them_from_the_work_folder(
    start: Path, tmp_path: Path, scale: ScaleSettings
) -> None:
    async with AsyncExitStack() as stack:
        fakes = [FakeVllm(start, context=CONTEXT) for _ in range(2)]
        urls = tuple([await stack.enter_async_context(fake.serving()) for fake in fakes])
        serve = ServeSettings(engine="vllm", replicas=2, urls=urls, placement="disaggregated")
        await step_and_ask(a_job(tmp_path, serve, scale=scale), start)
        assert all("/collective_rpc" in fake.calls for fake in fakes)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["1"]


@pytest.mark.parametrize("scale", [ScaleSettings(), SCATTERED], ids=["whole", "scattered"])
async def test_of_adapters_servers_get_the_adapters(
    start: Path, tmp_path: Path, scale: ScaleSettings
) -> None:
    fake = FakeVllm(start, context=CONTEXT)
    async with fake.serving() as url:
        serve = ServeSettings(engine="vllm", urls=(url,), placement="disaggregated")
        lora = LoraSettings(rank=2)
        await step_and_ask(a_job(tmp_path, serve, lora=lora, scale=scale), start)
    assert "/collective_rpc" not in fake.calls
    assert [name.partition("-")[0] for name in fake.adapters] == ["1"]


def test_each_replica_has_its_own_gpus() -> None:
    def devices(**settings: Any) -> list[tuple[int, ...]]:
        serve = ServeSettings(engine="vllm", replicas=2, tensor_parallel=2, **settings)
        return [serve.devices_of(number, 4) for number in range(2)]

    assert devices() == [(0, 1), (2, 3)]
    assert devices(placement="disaggregated") == [(4, 5), (6, 7)]
    assert devices(devices=(7, 6, 5, 4)) == [(7, 6), (5, 4)]
