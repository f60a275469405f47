"""New weights for engines that run: whole ones, adapters, of a trainer in this process; and sleep."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from katcore.errors import EngineError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine, open_engine
from katcore.inference.vllm import Elsewhere, VllmEngine
from katcore.protocols import SupportsSleep, SupportsWeights
from katcore.train.policy import load_policy
from tests.inference.fake_vllm import FakeVllm
from tests.inference.tiny import CONTEXT, request

PROMPT = (9, 31, 77)
MODULE = "model.layers.0.self_attn.q_proj"


def write_adapter(folder: Path, seed: int) -> Path:
    """An adapter of rank 2 for one layer of the tiny model."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    random = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=random) for shape in ((2, 32), (32, 2)))
    name = f"base_model.model.{MODULE}"
    weights = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def merged(model_folder: Path, adapter: Path, out: Path) -> Path:
    """The tiny model with the adapter in it, put together by hand."""
    from safetensors.torch import load_file

    model, weights = load_policy(model_folder), load_file(adapter / "adapter_model.safetensors")
    down, up = (weights[f"base_model.model.{MODULE}.lora_{one}.weight"] for one in "AB")
    with torch.no_grad():
        model.get_submodule(MODULE).weight += 4.0 * (up @ down)
    model.save_pretrained(out)
    ChatTokenizer(model_folder)._tokenizer.save_pretrained(out)
    return out


async def greedy(folder: Path) -> tuple[int, ...]:
    return (
        await open_engine(folder, num_slots=1, context=CONTEXT).generate(request("s", PROMPT))
    ).ids


async def test_adapters_are_swapped_while_calls_go_on(
    engine: VllmEngine, fake: FakeVllm, model_folder: Path, tmp_path: Path
) -> None:
    assert isinstance(engine, SupportsWeights)
    first, second = (write_adapter(tmp_path / f"a{seed}", seed) for seed in (1, 2))
    wanted = [
        await greedy(merged(model_folder, one, tmp_path / f"m{one.name}"))
        for one in (first, second)
    ]
    assert wanted[0] != wanted[1]
    await engine.load_weights(first, "1")
    fake.delay_s = 0.02
    running = asyncio.create_task(engine.generate(request("s", PROMPT)))
    await asyncio.sleep(0.05)
    await engine.load_weights(second, "2")
    assert not running.done()
    later = await engine.generate(request("t", PROMPT))
    old = await running
    assert (old.ids, old.policy_version) == (wanted[0], "1")
    assert (later.ids, later.policy_version) == (wanted[1], "2")
    assert "/pause" not in fake.calls
    await engine.load_weights(first, "3")
    assert [name.partition("-")[0] for name in fake.adapters] == ["3"]
    assert (await engine.generate(request("s", PROMPT))).policy_version == "3"


async def test_an_adapter_that_is_refused_leaves_nothing_to_ask(
    engine: VllmEngine, tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    with pytest.raises(EngineError, match="does not take"):
        await engine.load_weights(tmp_path / "config", "1")
    with pytest.raises(EngineError, match="did not take the weights"):
        await engine.generate(request("s", PROMPT))


async def test_a_server_sleeps_when_all_is_answered_and_wakes_with_new_weights(
    engine: VllmEngine, fake: FakeVllm, model_folder: Path, tmp_path: Path
) -> None:
    assert isinstance(engine, SupportsSleep)
    model = load_policy(model_folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    folder = tmp_path / "new"
    model.save_pretrained(folder)
    await engine.load_weights(model_folder, "1")
    fake.delay_s = 0.01
    running = asyncio.create_task(engine.generate(request("s", PROMPT)))
    await asyncio.sleep(0.03)
    await engine.sleep()
    assert (await running).policy_version == "1"
    assert fake.model is None
    waiting = asyncio.create_task(engine.generate(request("s", PROMPT)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    fake.calls.clear()
    await engine.load_weights(folder, "2")
    made = await waiting
    assert fake.calls[:3] == ["/wake_up", "/collective_rpc", "/wake_up"]
    assert made.policy_version == "2"
    folder_with_tokenizer = merged_tokenizer(model_folder, folder)
    assert made.ids == await greedy(folder_with_tokenizer)


def merged_tokenizer(model_folder: Path, folder: Path) -> Path:
    ChatTokenizer(model_folder)._tokenizer.save_pretrained(folder)
    return folder


async def test_a_server_with_an_adapter_keeps_the_weights_below_it(
    engine: VllmEngine, fake: FakeVllm, tmp_path: Path
) -> None:
    await engine.load_weights(write_adapter(tmp_path / "a", 1), "1")
    await engine.sleep()
    assert fake.model is not None
    await engine.load_weights(write_adapter(tmp_path / "b", 2), "2")
    assert (await engine.generate(request("s", PROMPT))).policy_version == "2"


async def test_a_server_that_has_ended_is_not_started_to_sleep(model_folder: Path) -> None:
    class Ended(Elsewhere):
        def runs(self) -> bool:
            return False

    engine = VllmEngine(Ended("http://127.0.0.1:9"), ChatTokenizer(model_folder))
    await engine.sleep()
    await engine.close()


async def test_a_server_whose_new_weights_fail_does_not_keep_callers_waiting(
    engine: VllmEngine, model_folder: Path, tmp_path: Path
) -> None:
    await engine.load_weights(model_folder, "1")
    await engine.sleep()
    with pytest.raises(EngineError, match="Cannot find any model weights"):
        await engine.load_weights(tmp_path, "2")
    with pytest.raises(EngineError, match="did not take the weights"):
        await engine.generate(request("s", PROMPT))


async def test_an_engine_with_a_copy_finishes_what_it_began(model_folder: Path) -> None:
    trained = load_policy(model_folder)
    chat = ChatTokenizer(model_folder)
    engine = EmbeddedEngine(load_policy(model_folder), chat, num_slots=2, context=CONTEXT)
    first = await greedy(model_folder)
    with torch.no_grad():
        trained.model.norm.weight.mul_(-1)
    running = asyncio.create_task(engine.generate(request("s", PROMPT)))
    for _ in range(4):
        await asyncio.sleep(0)
    copying = asyncio.create_task(engine.copy_weights(trained.state_dict(), "5"))
    await asyncio.sleep(0)
    later = asyncio.create_task(engine.generate(request("t", PROMPT)))
    old, _, new = await asyncio.gather(running, copying, later)
    assert (old.ids, old.policy_version) == (first, "0")
    assert new.policy_version == "5"
    wanted = EmbeddedEngine(trained, chat, num_slots=2, context=CONTEXT)
    assert new.ids == (await wanted.generate(request("s", PROMPT))).ids != first
    with torch.no_grad():
        trained.model.norm.weight.mul_(-1)
    again = await engine.generate(request("u", PROMPT))
    assert again.ids == new.ids, "what the trainer does later is not seen"
