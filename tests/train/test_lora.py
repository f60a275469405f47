"""Adapters: trees stay exact, what is written is the model that was trained, resuming is going on."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from katcore.errors import StageError
from katcore.settings import LoraSettings
from katcore.train.engine import Engine
from katcore.train.lora import add_adapters, dropping, merge, save_adapter
from katcore.train.objective import Sft
from katcore.train.trainer import Schedule, Trainer
from tests.train.architectures import tiny
from tests.train.test_attention import relative
from tests.train.trees import alone, gradients, sample, small_model

TREE = sample(
    [1, 2, 3, 4, 5, 6, 7, 8],
    [-1, 0, 1, 2, 1, 4, 0, 6],
    [False, True, True, True, True, False, True, True],
)
IDS = torch.tensor([[1, 4, 2, 9, 3]])


def adapted(model: Any, **settings: Any) -> Any:
    add_adapters(model, LoraSettings(rank=2, alpha=4.0, **settings), seed=3)
    return model.double()


def stirred(model: Any) -> Any:
    """With adapters that change something."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-moe"])
@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_tree_is_the_mean_of_its_branches(name: str, max_tokens: int) -> None:
    model = stirred(adapted(tiny(name)))
    engine = Engine(model)
    if max_tokens:
        loss = engine.backward_in_parts(TREE, Sft(), 1.0, max_tokens)
    else:
        loss = engine.backward([TREE], Sft(), 1.0)
    found = gradients(model)
    model.zero_grad()
    paths = alone(TREE)
    single = sum(engine.backward([path], Sft(), len(paths)) for path in paths)
    assert loss == pytest.approx(single, rel=1e-10)
    assert relative(found, gradients(model)) < 1e-10
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_and_routers_have_no_adapters(name: str) -> None:
    model = adapted(tiny(name))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(StageError, match=r"experts or routers, which take no adapters"):
        adapted(tiny(name), targets=("q_proj", "down_proj" if name == "qwen3-moe" else "w2"))


def test_adapters_change_nothing_until_they_are_trained() -> None:
    plain = small_model()
    wanted = plain(IDS).logits
    torch.testing.assert_close(adapted(copy.deepcopy(plain))(IDS).logits, wanted)
    assert not torch.equal(stirred(adapted(plain))(IDS).logits, wanted)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_what_is_written_is_the_model_that_was_trained(tmp_path: Path, name: str) -> None:
    start = tiny(name)
    start.save_pretrained(tmp_path / "start")
    model = stirred(adapted(start))
    wanted = model(IDS).logits
    save_adapter(model, tmp_path / "adapter")
    merge(model)
    assert not any("lora" in name for name, _ in model.named_modules())
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-10, atol=1e-10)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float64)
    plain.config._experts_implementation = "eager"  # grouped products know no float64
    by_peft = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").double().eval()
    assert by_peft(IDS).logits.sub(wanted).abs().max() < 1e-4  # its norms compute in float32
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert "q_proj" in config["target_modules"]
    assert "lm_head" not in config["target_modules"]


def test_a_checkpoint_has_what_is_trained_and_goes_on(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return Trainer(adapted(small_model()), Schedule(1e-2, 9))

    whole, cut = trainer(), trainer()
    for number in range(4):
        for one in (whole, cut):
            last = one.update([TREE], Sft())
        if number == 1:
            cut.save(tmp_path / "checkpoint", note=1)
            cut = trainer()
            assert cut.load(tmp_path / "checkpoint") == {"note": 1}
    again = trainer()
    again.load(tmp_path / "checkpoint")
    again.update([TREE], Sft())
    assert again.update([TREE], Sft())["loss"] == last["loss"]
    (saved,) = (tmp_path / "checkpoint").glob("*/trainer.pt")
    names = torch.load(saved, weights_only=True)["model"]
    assert names
    assert all("lora_" in name for name in names)


def test_dropout_is_for_updates_only() -> None:
    model = stirred(adapted(small_model(), dropout=0.5))
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    with dropping(model):
        assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_a_target_that_is_not_there_is_said() -> None:
    with pytest.raises(StageError, match=r"lora\.targets does not fit"):
        adapted(small_model(), targets=("nonesuch",))
