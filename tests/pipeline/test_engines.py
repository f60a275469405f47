"""The engines of a training: which weights they have, and when."""

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from katcore.config import LoraSettings, ModelSettings, Preset
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine
from katcore.inference.router import Router
from katcore.inference.vllm import Elsewhere, VllmEngine
from katcore.pipeline.engines import Engines, Weights, open_engines
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.progress import Progress
from katcore.pipeline.stage import Job
from katcore.pipeline.stream import Stream
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


@pytest.mark.parametrize(
    "precisions", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("", "")]
)
async def test_weights_are_rounded_where_all_servers_would_round_them(
    start: Path, tmp_path: Path, precisions: tuple[str, ...]
) -> None:
    async with AsyncExitStack() as stack:
        fakes = [FakeVllm(start, context=CONTEXT) for _ in precisions]
        for fake, precision in zip(fakes, precisions, strict=True):
            fake.precision = precision
        urls = tuple([await stack.enter_async_context(fake.serving()) for fake in fakes])
        serve = ServeSettings(engine="vllm", replicas=2, urls=urls, placement="disaggregated")
        job = a_job(tmp_path, serve)
        trainer = Trainer(load_trainable(start, job.preset, 0), Schedule(0.0, 1))
        engines = await stack.enter_async_context(open_engines(job, trainer.model, start))
        await engines.hand_over("0", trainer.weights())
        (file,) = (tmp_path / "weights" / "0").glob("*.safetensors")
        found = load_file(file)
        is_narrow = set(precisions) == {"bfloat16"}
        assert {one.dtype for one in found.values()} == {
            torch.bfloat16 if is_narrow else torch.float32
        }
        whole = load_file(start / "model.safetensors")
        assert found.keys() == whole.keys(), "tied ones are there once"
        for name, weight in whole.items():
            assert torch.equal(found[name], weight.to(found[name].dtype))
        config = json.loads((file.parent / "config.json").read_bytes())
        assert config["dtype"] == ("bfloat16" if is_narrow else "float32")
        assert "bfloat16" not in str(trainer.model.config.dtype)
        for fake in fakes:
            served = dict(fake.model.named_parameters())
            assert all(torch.equal(served[name], found[name].float()) for name in found)


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


async def test_colocated_servers_wake_when_the_trainer_has_made_room(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm(start, context=CONTEXT)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: fake.calls.append("room"))

    async def make(step: int) -> list[Any]:
        await router.generate(request(f"s{step}", PROMPT))
        return []

    async def hand_over(version: str, weights: Weights) -> None:
        await router.renew(lambda engine: engine.load_weights(start, version))

    async with fake.serving() as url:
        router = Router([VllmEngine(Elsewhere(url), ChatTokenizer(start))])
        engines = Engines(router, hand_over, is_colocated=True)
        async with Stream(make, 2, engines, 0, dict) as stream:
            for step in range(2):
                await stream.of(step)
                await stream.run(fake.calls.append, "step")
        await router.close()
    asked = ["/sleep", "step", "room", "/wake_up", "/collective_rpc", "/v1/completions"]
    order = [call for call in fake.calls if call in asked]
    assert order[order.index("/sleep") :] == [
        *("/sleep", "step", "room", "/wake_up", "/collective_rpc", "/wake_up"),
        *("/v1/completions", "/sleep", "step"),
    ]


def test_each_replica_has_its_own_gpus() -> None:
    def devices(**settings: Any) -> list[tuple[int, ...]]:
        serve = ServeSettings(engine="vllm", replicas=2, tensor_parallel=2, **settings)
        return [serve.devices_of(number, 4) for number in range(2)]

    assert devices() == [(0, 1), (2, 3)]
    assert devices(placement="disaggregated") == [(4, 5), (6, 7)]
    assert devices(devices=(7, 6, 5, 4)) == [(7, 6), (5, 4)]
