"""One GGUF file of a Llama, written out as a Hugging Face folder.

Quantised tensors are expanded (what the quantisation lost stays lost). Rotary weights are stored in pairs in
GGUF and in halves by Hugging Face, so queries and keys are permuted back. Agreement with transformers' own
reader was checked once per tensor; ours keeps the tokenizer as it was trained, digits apart.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from katcore.errors import StageError

transformers_logging.disable_progress_bar()

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.weight")
_START, _END, _PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def to_folder(path: Path, out: Path, report: Callable[[str], None]) -> int:
    """Write config, bfloat16 weights, tokenizer and chat template; returns the number of parameters.

    Raises:
        StageError: another architecture or tokenizer than the ones we know, or a tensor missing.
        OSError: the disk is full.
    """
    try:
        reader: Any = GGUFReader(path)
    except ValueError as error:
        raise StageError(f"{path.name}: not a GGUF file: {error}") from error
    facts = dict(reader.fields)
    report("converting the tokenizer")
    out.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(facts, out)
    model = LlamaForCausalLM(_config(facts, {tensor.name for tensor in reader.tensors}))
    report("converting the weights")
    missing, unexpected = model.load_state_dict(dict(_weights(reader, model.config)), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise StageError(f"{path.name}: tensors missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    try:
        model.to(torch.bfloat16).save_pretrained(str(out), safe_serialization=True)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code.group(1)) if code else 5, str(error)) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _fact(facts: dict[str, Any], name: str) -> Any:
    if name not in facts:
        raise StageError(f"the GGUF file does not say {name!r}")
    return facts[name].contents()


def _config(facts: dict[str, Any], tensors: set[str]) -> LlamaConfig:
    architecture = _fact(facts, "general.architecture")
    if architecture != "llama":
        raise StageError(f"its architecture is {architecture!r}; only 'llama' can be converted")

    def of(name: str) -> Any:
        return _fact(facts, f"llama.{name}")

    tokens = _fact(facts, "tokenizer.ggml.tokens")
    return LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=of("attention.head_count"),
        num_key_value_heads=of("attention.head_count_kv"),
        max_position_embeddings=of("context_length"),
        rms_norm_eps=of("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": of("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=None,
        eos_token_id=tokens.index(_END),
        pad_token_id=tokens.index(_PAD),
    )


def _weights(reader: Any, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        found = _TENSOR.fullmatch(tensor.name)
        if not found or found.group(2) not in _NAMES:
            raise StageError(f"a tensor that no Llama has: {tensor.name!r}")
        layer, name = found.groups()
        values = dequantize(tensor.data, tensor.tensor_type)
        if name in heads:
            values = _halves(values, heads[name])
        prefix = f"model.layers.{layer}." if layer else ""
        yield f"{prefix}{_NAMES[name]}.weight", torch.from_numpy(np.array(values))


def _halves(values: Any, heads: int) -> Any:
    """Rows of each head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...)."""
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(facts: dict[str, Any], out: Path) -> None:
    kind = (_fact(facts, "tokenizer.ggml.model"), _fact(facts, "tokenizer.ggml.pre"))
    tokens = _fact(facts, "tokenizer.ggml.tokens")
    if kind != ("gpt2", "smollm") or not {_START, _END, _PAD} <= set(tokens):
        raise StageError(f"its tokenizer is {kind}; only SmolLM's, with ChatML, can be converted")
    merges = [tuple(merge.split(" ")) for merge in _fact(facts, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (_PAD, _START, _END)]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "pad_token": _PAD,
        "additional_special_tokens": [_START],
        "clean_up_tokenization_spaces": False,
        "chat_template": _TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
