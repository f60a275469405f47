"""Models that cannot be given trees are found out, and then trained on branches, or refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from katcore.config import LoraSettings, Preset
from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.settings import ScaleSettings
from katcore.train.batch import collate
from katcore.train.layout import packed, unrolled
from katcore.train.objective import Sft
from katcore.train.prepare import load_trainable
from katcore.train.support import refusal, takes_trees
from katcore.train.trainer import Schedule, Trainer
from tests.train.architectures import CONFIGS, SHAPE, tiny
from tests.train.test_attention import logits_of, logits_of_branches, relative
from tests.train.trees import sample

WITHOUT: dict[str, tuple[PreTrainedConfig, str]] = {
    "window": (MistralConfig(**SHAPE, sliding_window=3), "sliding_window=3"),
    "layers": (
        Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=3, pad_token_id=0),
        "layers of the kind sliding_attention",
    ),
    "state space": (
        MambaConfig(vocab_size=23, hidden_size=16, num_hidden_layers=2, state_size=4),
        "layers of the kind linear_attention",
    ),
    "sinks": (
        GptOssConfig(
            **SHAPE,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["full_attention"] * 2,
            pad_token_id=0,
        ),
        "not one that SDPA computes",
    ),
}


def built(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tree() -> Sample:
    parents = [-1, 0, 1, 2, 3, 4, 2, 6, 7, 8]
    return sample([*range(1, 11)], parents, [False, *[True] * 9])


@pytest.mark.parametrize("name", CONFIGS)
def test_models_with_full_attention_take_trees(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert refusal(model.train()) == ""
    assert model.training


@pytest.mark.parametrize("name", WITHOUT)
def test_others_say_why_and_are_trained_on_branches(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, reason = WITHOUT[name]
    model = built(config)
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(model, Schedule(1e-2, 10))
    (record,) = (one for one in caplog.records if one.name == "katcore.train.support")
    assert reason in record.getMessage()
    batch = collate([tree()], layout=unrolled)
    apart = logits_of_branches(model, [tree()])
    assert relative(logits_of(model, batch), apart) < 1e-5
    losses = [trainer.update([tree()], Sft())["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]
    assert len(trainer.logprobs([tree()])["r"]) == 9


@pytest.mark.parametrize("name", WITHOUT)
def test_required_trees_are_an_error(name: str) -> None:
    config, reason = WITHOUT[name]
    with pytest.raises(StageError, match=f"cannot be given token trees: .*{reason}"):
        Trainer(built(config), Schedule(1e-2, 10), trees="required")


def test_a_model_that_ignores_what_it_is_told_is_found_by_trying() -> None:
    """Its configuration says nothing of a layer that mixes neighbours in the row."""
    model = tiny("llama")
    layer = model.model.layers[0]
    plain = layer.forward

    def mixing(hidden: torch.Tensor, **options: Any) -> Any:
        return plain(hidden + hidden.roll(1, dims=1), **options)

    layer.forward = mixing
    assert "apart from those of its branches" in refusal(model)
    assert not takes_trees(model)


@pytest.mark.parametrize(("size", "reason"), [(1e-5, ""), (1e-3, "a small tree has logits")])
def test_what_rounding_does_to_a_deep_model_is_no_reason(size: float, reason: str) -> None:
    model = tiny("llama").float()
    layer = model.model.layers[0]
    plain = layer.forward

    def rounding(hidden: torch.Tensor, **options: Any) -> Any:
        is_tree = hidden.shape[1] > 4
        return plain(hidden + size * is_tree * hidden.roll(1, dims=2), **options)

    layer.forward = rounding
    assert refusal(model).startswith(reason)
    assert bool(refusal(model)) == bool(reason)


@pytest.mark.parametrize(
    "config",
    [
        CohereConfig(**SHAPE, logit_scale=0.5, pad_token_id=0),
        Gemma2Config(**SHAPE, head_dim=8, sliding_window=3, final_logit_softcapping=2.0),
    ],
    ids=["scaled", "capped, behind a window"],
)
def test_a_model_that_scales_its_logits_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(StageError, match="scale or cap"):
        takes_trees(built(config))


def in_bfloat16(config: PreTrainedConfig, folder: Path, **given: Any) -> Any:
    """A model as a preset in bfloat16 has it trained."""
    built(config).save_pretrained(folder)
    scale = ScaleSettings(precision="bfloat16", **given.pop("scale", {}))
    return load_trainable(folder, Preset(name="p", summary="", scale=scale, **given), 0)


@pytest.mark.parametrize("given", [{}, {"scale": {"recompute": True}}, {"scale": {"zero": 3}}])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_in_bfloat16_too_trees_are_used(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    """Whose rounding is no reason to refuse: it is larger than what a small tree shows."""
    model = in_bfloat16(CONFIGS[name], tmp_path, **given)
    trainer = Trainer(model, Schedule(1e-2, 10), trees="required")
    assert trainer._engine.layout is None
    ids = torch.tensor([[1, 2, 3]])
    hidden = [
        one.base_model(input_ids=ids).last_hidden_state for one in (model, built(CONFIGS[name]))
    ]
    assert 1e-4 < relative(*hidden) < 0.1, "it computes in bfloat16 all the same"


def test_in_bfloat16_adapters_are_trained_on_trees_and_a_window_is_seen(tmp_path: Path) -> None:
    lora = LoraSettings(rank=2)
    adapted = in_bfloat16(CONFIGS["qwen3"], tmp_path / "adapted", lora=lora)
    assert takes_trees(adapted, "required")
    windowed = in_bfloat16(WITHOUT["window"][0], tmp_path / "windowed")
    with pytest.raises(StageError, match="sliding_window=3"):
        Trainer(windowed, Schedule(1e-2, 10), trees="required")


def test_in_bfloat16_a_token_that_is_seen_by_mistake_is_noticed(tmp_path: Path) -> None:
    model = in_bfloat16(CONFIGS["llama"], tmp_path)
    layer = model.model.layers[0]
    plain = layer.forward

    def mixing(hidden: torch.Tensor, **options: Any) -> Any:
        return plain(hidden + 1e-3 * hidden.roll(1, dims=1), **options)

    layer.forward = mixing
    assert "apart from those of its branches" in refusal(model)


def test_a_window_changes_what_a_packed_tree_gives() -> None:
    """So the refusal is not for nothing."""
    model = built(WITHOUT["window"][0])
    found = logits_of(model, collate([tree()], layout=packed))
    assert relative(found, logits_of_branches(model, [tree()])) > 1e-3
