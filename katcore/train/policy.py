"""The policy: a causal language model in a Hugging Face folder, its weights and its log-probabilities.

Initialisation departs from the Hugging Face default, for models that have minutes to learn to copy. At a
width of 128 a standard deviation of 0.02 learns next to nothing, so linear layers start at 1/sqrt(fan_in) and
layers that write to the residual stream at 1/sqrt(2 L fan_in) or, behind the MLP, at 0. Embeddings are tied:
what a head copies comes out as the token it was. And two heads of the first layer start by attending to the
token before and the one before that (`_attend_backwards`), the first half of an induction circuit (arXiv
2209.11895). tests/train/test_policy.py shows that they do; docs/experiments.md has what each is worth.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from katcore.config import ModelSettings
from katcore.train import lockstep
from katcore.train.attention import NAME, PREPARED, TreeMask
from katcore.train.layout import Mask
from katcore.train.replay import following

transformers_logging.disable_progress_bar()

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_BACKWARDS = 7.0
"""Bias of a head that attends backwards: some six nats above the neighbouring tokens at a head size of 32."""


def new_policy(settings: ModelSettings, *, vocabulary: int, end_id: int, seed: int) -> Any:
    """A Llama with fresh weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        attention_bias=True,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=settings.hidden**-0.5)
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            if name.endswith("o_proj"):
                std /= (2 * settings.layers) ** 0.5
            nn.init.normal_(module.weight, std=0.0 if name.endswith("down_proj") else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    _attend_backwards(model.model.layers[0].self_attn, (1, 2), config)
    return model


def _attend_backwards(attention: Any, distances: Sequence[int], config: LlamaConfig) -> None:
    """Bias the first heads so that each attends to the token `distance` before.

    Rotary embedding turns the key's bias b by its place s and the query's b exp(-i d w) by its place p; their
    product, the sum of |b|^2 cos((p - s - d) w) over the frequencies w, is greatest at p - s = d. The weights
    of these heads start small, so that what the tokens are matters less than where.
    """
    size = config.hidden_size // config.num_attention_heads
    half = size // 2
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    share = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for head, distance in enumerate(distances[: config.num_attention_heads]):
            key = head // share * size
            attention.k_proj.bias[key : key + half] = _BACKWARDS
            turn, start = distance * frequencies, head * size
            attention.k_proj.weight[key : key + size] *= 0.1
            attention.q_proj.weight[start : start + size] *= 0.1
            attention.q_proj.bias[start : start + half] = _BACKWARDS * turn.cos()
            attention.q_proj.bias[start + half : start + size] = -_BACKWARDS * turn.sin()


def limit_threads(num: int) -> None:
    """Compute with `num` threads in this process."""
    torch.set_num_threads(num)


def load_policy(folder: Path) -> Any:
    """The model of a folder in float32, without dropout."""
    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True
    ).eval()


def save_policy(
    model: Any,
    folder: Path,
    *,
    tokenizer: Path,
    weights: Mapping[str, Tensor] | None = None,
    in_bfloat16: bool = False,
) -> None:
    """Write a folder that `load_policy` and vLLM read; tokenizer files are copied from `tokenizer`.

    The `weights` are the model's own, if they are not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(weights) if weights else None
    if in_bfloat16:
        state = _rounded(state or model.state_dict())
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    if in_bfloat16:
        config = copy.deepcopy(model.config)
        config.dtype = torch.bfloat16
        config.save_pretrained(str(folder))
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists() and tokenizer != folder:
            shutil.copy2(tokenizer / name, folder / name)


def _rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In bfloat16; what is one tensor under two names stays one."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    found = {}
    for name, tensor in state.items():
        key = tensor.data_ptr(), tensor.shape
        if key not in made:
            made[key] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        found[name] = made[key]
    return found


def logits_at(model: Any, ids_BT: Tensor, positions_BT: Tensor, mask: Mask, at_N: Tensor) -> Tensor:
    """Logits at N flat positions (b * T + t) only: the vocabulary projection is the dear part.

    Returns (N, V), at least float32.
    """
    hidden_BTD = hidden(model, ids_BT, positions_BT, mask).last_hidden_state
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[at_N]
    return logits_of(model, hidden_ND)


def hidden(
    model: Any,
    ids_BT: Tensor,
    positions_BT: Tensor,
    mask: Mask,
    *,
    routes_PLK: Tensor | None = None,
    **options: Any,
) -> Any:
    """What the layers below the vocabulary projection give, as transformers says it.

    With `routes_PLK` the tokens are sent to these experts (`replay`).
    """
    if together := lockstep.of(model):
        together.turn(model, "forward" if torch.is_grad_enabled() else "look")
    place = model.device
    ids_BT, positions_BT = ids_BT.to(place), positions_BT.to(place)
    if isinstance(mask, TreeMask):
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        options |= {"tree": mask, "attention_mask": PREPARED, "position_ids": positions_BT}
    elif mask is not None:
        options |= {
            "attention_mask": additive(mask[:, None].to(place), model.dtype),
            "position_ids": positions_BT,
        }
    with nullcontext() if routes_PLK is None else following(model, routes_PLK):
        return model.base_model(input_ids=ids_BT, use_cache=False, **options)


def go_back(model: Any, found: Any, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Backwards from tensors, given their gradients, through the layers that made what was `found`."""
    if together := lockstep.of(model):
        together.turn(model, "back")
        # Through all layers, also where nothing is to learn.
        tensors = [*tensors, found.last_hidden_state]
        grads = [*grads, torch.zeros_like(found.last_hidden_state)]
    if tensors:
        torch.autograd.backward(tensors, grads)


def logits_of(model: Any, hidden_ND: Tensor) -> Tensor:
    """The vocabulary projection, (N, V), at least float32."""
    logits_NV: Tensor = model.get_output_embeddings()(hidden_ND)
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what is added to attention scores: 0 where True, the lowest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )
