"""Activations are at least what a model keeps for its backward pass on a CPU, and at most a quarter more."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from katcore.budget.activation import Precision, activation_bytes, layer_bytes
from katcore.budget.shape import shape_of
from katcore.train.precision import compute_in_bfloat16

TOKENS = 200
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 32}
CONFIGS = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3-moe": {"model_type": "qwen3_moe", **EXPERTS},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}


PRECISIONS = {
    "float32": Precision(),
    "bfloat16": Precision(2),
    "mixed": Precision(2, is_mixed=True),
}


def kept_bytes(config: dict[str, Any], precision: Precision, *, is_recomputed: bool) -> int:
    """Of all that autograd saves below the vocabulary projection, weights apart; each storage once."""
    torch.manual_seed(0)
    is_wide = precision.element == 4 or precision.is_mixed
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config),
        dtype=torch.float32 if is_wide else torch.bfloat16,
        attn_implementation="sdpa",
    )
    if is_recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if precision.is_mixed:
        compute_in_bfloat16(model)
    shapes = {one.shape for one in model.parameters()}
    shapes |= {one.mT.shape for one in model.parameters() if one.dim() > 1}
    shapes |= {one.shape[1:] for one in model.parameters() if one.dim() > 2}
    shapes |= {one.mT.shape[1:] for one in model.parameters() if one.dim() > 2}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Weights, and in mixed precision their copies, are no activations; no activation has their shape.
        if tensor.shape not in shapes:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.randint(0, 64, (1, TOKENS))
        out = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_keeps_about_what_is_estimated(name: str, precision: str) -> None:
    config, computed = SHAPE | CONFIGS[name], PRECISIONS[precision]
    shape = shape_of(config, name)
    estimate = activation_bytes(shape, TOKENS, computed, is_recomputed=False)
    estimate -= TOKENS * layer_bytes(shape, computed)
    assert 1.0 <= estimate / kept_bytes(config, computed, is_recomputed=False) <= 1.25


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_keeps_the_inputs_of_layers(name: str, precision: str) -> None:
    config, computed = SHAPE | CONFIGS[name], PRECISIONS[precision]
    shape = shape_of(config, name)
    estimate = activation_bytes(shape, TOKENS, computed, is_recomputed=True)
    estimate -= TOKENS * 2 * layer_bytes(shape, computed)
    assert 1.0 <= estimate / kept_bytes(config, computed, is_recomputed=True) <= 1.25
