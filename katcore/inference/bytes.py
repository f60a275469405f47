"""A tokenizer of bytes: no training, any text, and the chat format of a model family.

For scripted answers and tiny random models, where a real model's tokenizer would have to be downloaded first.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from katcore.inference.chat import ChatTokenizer

END = "<|im_end|>"
_CONTROL = ("<|endoftext|>", "<|im_start|>", END)
_MARKS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip


def write_byte_tokenizer(folder: Path, *, template: str = "", end: str = END) -> Path:
    """Write a tokenizer into `folder`: 256 bytes, then control tokens. By default it speaks as Qwen3 does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = list(dict.fromkeys((*_CONTROL, end)))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in control])
    tokenizer.add_tokens([AddedToken(text) for text in _MARKS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": control[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": template or _qwen3(),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder


def byte_chat() -> ChatTokenizer:
    """A tokenizer of bytes in Qwen3's chat format."""
    with tempfile.TemporaryDirectory() as folder:
        return ChatTokenizer(write_byte_tokenizer(Path(folder)))


def _qwen3() -> str:
    from trl.chat_template_utils import qwen3_chat_template  # noqa: PLC0415 - takes seconds

    return str(qwen3_chat_template)
