"""Messages to token ids, by the tokenizer's own chat template."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from katcore.errors import EngineError
from katcore.schema.call import Message

_PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


class ChatTokenizer:
    """A model folder's tokenizer and chat template."""

    def __init__(self, model: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
        if not self._tokenizer.chat_template:
            raise EngineError(f"{model}: its tokenizer has no chat template")

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return int(self._tokenizer.eos_token_id)

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return len(self._tokenizer)

    def encode(self, messages: Sequence[Message], *, is_continuation: bool) -> tuple[int, ...]:
        """See `Engine.encode`.

        A continuation is what the template renders after a finished answer: the template applied to a
        conversation of two plus `messages`, less that conversation up to its end-of-turn token.
        """
        chat = [
            {"role": message.role, "content": self._plain(message.content)} for message in messages
        ]
        if not is_continuation:
            return self._ids(self._render(chat))
        text = self._render([*_PAIR, *chat])
        if not text.startswith(self._stem):
            raise EngineError(
                "the chat template rewrites history; conversations cannot be continued"
            )
        return self._ids(text[len(self._stem) :])

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an answer's text, its end-of-turn token included."""
        return (*self._ids(self._plain(text)), self.end_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @cached_property
    def _stem(self) -> str:
        text = str(self._tokenizer.apply_chat_template(_PAIR, tokenize=False))
        end = str(self._tokenizer.eos_token)
        return text[: text.rindex(end) + len(end)]

    def _render(self, chat: list[dict[str, str]]) -> str:
        return str(
            self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )

    def _plain(self, content: str) -> str:
        """`content` with the control tokens it spells broken up: a file may not end a turn."""
        for token in self._tokenizer.all_special_tokens:
            if token in content:
                content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))
