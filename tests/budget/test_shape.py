"""Parameters are counted as transformers builds them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from katcore.budget.shape import known_models, scratch_config, shape_from_file, shape_of
from katcore.config import ModelSettings
from katcore.errors import ConfigError
from katcore.train.policy import new_policy

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
CONFIGS = [
    {"model_type": "llama"},
    {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    {"model_type": "mistral", "head_dim": 8},
    {"model_type": "qwen2"},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "head_dim": 8},
    {"model_type": "qwen3_moe", **MOE},
    {"model_type": "qwen3_moe", **MOE, "mlp_only_layers": [1]},
    {"model_type": "qwen3_moe", **MOE, "decoder_sparse_step": 2},
    {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
]
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, 134_515_008),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": (494_032_768, 494_032_768),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": (1_543_714_304, 1_543_714_304),
    "Qwen/Qwen2.5-Coder-7B-Instruct": (7_615_616_512, 7_615_616_512),
    "Qwen/Qwen2.5-Coder-32B-Instruct": (32_763_876_352, 32_763_876_352),
    "Qwen/Qwen3-8B": (8_190_735_360, 8_190_735_360),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": (30_532_122_624, 3_353_032_704),
    "meta-llama/Llama-3.1-8B-Instruct": (8_030_261_248, 8_030_261_248),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (46_702_792_704, 12_879_925_248),
}


def built(config: dict[str, Any]) -> Any:
    """Without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_parameters_are_those_of_the_model(config: dict[str, Any]) -> None:
    # What transformers assumes where a file is silent is not what we do: its files say it.
    said = TINY | {"tie_word_embeddings": False} | config
    model, shape = built(said), shape_of(said, "here")
    assert shape.num_parameters == model.num_parameters()
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert shape.largest_layer == max(layers)
    assert shape.ends == model.num_parameters() - sum(layers)


@pytest.mark.parametrize("name", known_models())
def test_well_known_models_have_the_parameters_they_are_known_for(name: str) -> None:
    config = dict(known_models()[name])
    shape = shape_of(config, name)
    assert (shape.num_parameters, shape.num_active) == PUBLISHED[name]
    assert shape.num_parameters == built(config).num_parameters()


def test_the_model_from_scratch_is_counted_as_it_is_made() -> None:
    settings = ModelSettings()
    model = new_policy(settings, vocabulary=settings.vocabulary, end_id=1, seed=0)
    shape = shape_of(scratch_config(settings), "scratch")
    assert shape.num_parameters == model.num_parameters()
    assert shape == shape_of(model.config.to_dict(), "model")


def test_a_folder_says_its_shape(tmp_path: Path) -> None:
    config = known_models()["Qwen/Qwen3-8B"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_from_file(tmp_path) == shape_of(config, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "mamba"}', "'mamba' cannot be estimated; known are: llama"),
        ('{"model_type": "llama"}', "hidden_size, .* is missing"),
        ("{", "not valid JSON"),
    ],
)
def test_what_is_no_known_model_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        shape_from_file(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        shape_from_file(tmp_path / "nowhere")
