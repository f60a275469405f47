"""Tiny models of several architectures, in float64 also where theirs compute in float32 whatever they get."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.train.trees import VOCABULARY

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "smollm2": LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_theta=100000.0),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "qwen3-moe": Qwen3MoeConfig(
        **SHAPE,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        norm_topk_prob=True,
    ),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}


def tiny(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation="sdpa", experts_implementation="eager"
    )
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_norm, module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = functools.partial(_route, module)
            nn.init.normal_(module.weight)
    return model.double().eval()


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden, hidden.shape[-1:], module.weight, 1e-6)


def _route(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), module.weight)
    values, chosen = logits.softmax(-1).topk(module.top_k)
    return logits, values / values.sum(-1, keepdim=True), chosen
