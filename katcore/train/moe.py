"""A small mixture of experts, and engines of it that are not quite the trainer's: for studies of noise."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def new_moe(*, vocabulary: int, end_id: int, seed: int, context: int = 64) -> Any:
    """A Qwen3-MoE of some 350,000 parameters: three layers, eight experts, two of which see a token."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def engine_copy(model: Any, *, is_bfloat16: bool, jitter: float, seed: int) -> Any:
    """A copy to sample from, in bfloat16 or as it is.

    With `jitter` what its routers read is multiplied by a uniform draw from [1 - jitter, 1 + jitter], new in
    each pass (Switch Transformers, arXiv 2101.03961, section 2.2): experts change, and nothing else.
    """
    made = copy.deepcopy(model)
    if is_bfloat16:
        made = made.bfloat16()
    if jitter:
        random = torch.Generator().manual_seed(seed)

        def shake(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            draw = torch.rand(given[0].shape, generator=random) * 2 - 1
            return (given[0] * (1 + jitter * draw).to(given[0].dtype),)

        for name, module in made.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_pre_hook(shake)
    return made


def copy_weights(source: Any, target: Any) -> None:
    """Give `target` the weights of `source`, in its own precision."""
    target.load_state_dict(source.state_dict())
