"""Messages to token ids and back, by the tokenizer's own chat template and response template."""

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from katcore.errors import EngineError, RequestError
from katcore.inference.family import Family, family
from katcore.schema.call import Message, Tool, ToolCall

_QUESTION = {"role": "user", "content": "q"}
_MARK = "katcore-answer"
_REPLY = "katcore-reply"
_TAIL = 64
"""Ids of a prompt that are looked at to see whether the template began the answer."""

Said = tuple[str, str, tuple[ToolCall, ...]]
"""What an answer says: text, reasoning, tool calls."""


class ChatTokenizer:
    """A model folder's tokenizer and templates."""

    def __init__(self, model: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
        if not self._tokenizer.chat_template:
            raise EngineError(f"{model}: its tokenizer has no chat template")
        self.end_ids = frozenset(_end_ids(model, self._tokenizer))
        self._ends = [self._tokenizer.convert_ids_to_tokens(number) for number in self.end_ids]

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer, where it is us who write one: what the template ends one with."""
        return self._end_between({"role": "assistant", "content": _MARK}, _MARK, _QUESTION)

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return len(self._tokenizer)

    def encode(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), start: int = 0
    ) -> tuple[int, ...]:
        """See `Engine.encode`.

        What follows an answer is what the template renders after it in a conversation of a question, that
        answer and `messages[start:]`, from its end-of-turn token on.

        Raises:
            RequestError: a message holds an image.
            EngineError: the template does not render what was answered before.
        """
        return self._ids(self._prompt(messages, tools, start))

    def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool], start: int) -> str:
        if not start:
            return self._render(self._entries(messages, 0), tools)
        answered, *chat = self._entries(messages, start - 1)
        answered["content"] = _MARK
        answered.pop("reasoning_content", None)
        text = self._render([_QUESTION, answered, *chat], tools)
        at = text.find(_MARK)
        if at < 0:
            # Some templates show of an answer with tool calls nothing but these.
            asked = self._render([_QUESTION], tools)
            pairs = enumerate(zip(asked, text, strict=False))
            at = next((place for place, (a, b) in pairs if a != b), len(asked))
        return text[self._answer_end(text, at) :]

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an answer's text, its end-of-turn token included."""
        return (*self._ids(self._plain(text)), self.end_id)

    def answer_ids(
        self, message: Message, tools: Sequence[Tool], history: Sequence[Message] = ()
    ) -> tuple[int, ...]:
        """Ids of an answer to `history` as the template renders it, its end-of-turn token included.

        Where the template begins the answer with a thought, that is finished first.

        Raises:
            EngineError: the template has no place for tool calls.
        """
        begun = self._render([_QUESTION], tools)
        opened = _opened(self._prompt(history, tools, _num_answered(history)) if history else begun)
        close = "\n</think>\n\n" if opened.endswith("\n") else "</think>"
        thought = self._plain(message.reasoning) + close if opened else ""
        if not message.tool_calls:
            return (*self._ids(thought), *self.text_ids(message.content))
        (entry,) = self._entries([*history, message], len(history))
        whole = self._template([_QUESTION, entry], tools, add_generation_prompt=False)
        header = begun.removesuffix(_opened(begun))
        call = entry["tool_calls"][-1]
        name = call["function"]["name"]
        if not whole.startswith(header) or name not in whole[len(header) :]:
            raise EngineError("the chat template does not render tool calls")
        if whole.startswith(begun):
            header, thought = begun, ""
        elif whole.startswith("</think>", len(header)):
            thought = ""
        if self._ends_after(whole, len(header)):
            return self._ids(thought + whole[len(header) : self._answer_end(whole, len(header))])
        # Some families end an answer with the token that begins what comes next.
        result = {"role": "tool", "name": name, "tool_call_id": call["id"]}
        return (*self._ids(thought + whole[len(header) :]), self._end_between(entry, name, result))

    def read(
        self, ids: Sequence[int], prompt_ids: Sequence[int] = (), tools: Sequence[Tool] = ()
    ) -> Said:
        """What the ids of an answer say. What is no tool call, though it may look like one, is text."""
        if self._response is None:
            return self.decode(ids), "", ()
        prefix = self._tokenizer.decode(list(prompt_ids[-_TAIL:]), skip_special_tokens=False)
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        try:
            parsed = self._tokenizer.parse_response(
                text, self._response, prefix=prefix, tools=_offered(tools)
            )
            calls = tuple(map(_called, parsed.get("tool_calls") or ()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return self.decode(ids), "", ()
        content, reasoning = parsed.get("content") or "", parsed.get("reasoning_content") or ""
        for end in self._ends:
            content, reasoning = content.removesuffix(end), reasoning.removesuffix(end)
        if not (content or reasoning or calls):
            return self.decode(ids), "", ()
        return content.rstrip() if calls else content, reasoning.strip(), calls

    def differences(self, other: "ChatTokenizer") -> list[str]:
        """In what another tokenizer differs, so that a model of one cannot score the ids of the other."""
        found = []
        if self._tokenizer.get_vocab() != other._tokenizer.get_vocab():
            found.append("vocabulary")
        elif _pieces(self._tokenizer) != _pieces(other._tokenizer):
            found.append("how text is split")
        if self._tokenizer.chat_template != other._tokenizer.chat_template:
            found.append("chat template")
        if self.end_ids != other.end_ids:
            found.append("end-of-turn tokens")
        return found

    def in_calls(self, ids: Sequence[int]) -> list[bool]:
        """Which ids of an answer are inside its tool calls: those after its text, the end of turn apart."""
        text, reasoning, calls = self.read(ids) if self._response else ("", "", ())
        if not calls:
            return [False] * len(ids)

        def is_said(num: int) -> bool:
            whole = self._tokenizer.decode(list(ids[:num]), skip_special_tokens=False)
            at = whole.find(reasoning)
            return at >= 0 and text in whole[at + len(reasoning) :]

        begin = bisect_left(range(len(ids)), True, key=is_said)
        return [at >= begin and number not in self.end_ids for at, number in enumerate(ids)]

    def token_texts(self, ids: Iterable[int]) -> dict[int, str]:
        """See `SupportsTokens.token_texts`."""
        return {
            number: str(self._tokenizer.decode([number], skip_special_tokens=False))
            for number in sorted(set(ids))
        }

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    @cached_property
    def _response(self) -> Any:
        """How answers are read: the tokenizer's own response template, its family's, or the one TRL knows."""
        own = getattr(self._tokenizer, "response_template", None)
        template = str(self._tokenizer.chat_template)
        if own is not None or not ("tools" in template or "tool_calls" in template):
            return own
        if self._family:
            return self._family.response
        from trl.chat_template_utils import add_response_schema  # noqa: PLC0415 - takes seconds

        try:
            return add_response_schema(self._tokenizer).response_template
        except ValueError:
            return None

    def _answer_end(self, text: str, start: int) -> int:
        """Where the answer that begins at `start` or before is over."""
        ends = self._ends_after(text, start)
        if not ends:
            raise EngineError("the chat template ends no answer; no conversation can go on")
        return min(ends)

    def _ends_after(self, text: str, start: int) -> list[int]:
        return [
            text.find(end, start) + len(end) for end in self._ends if text.find(end, start) >= 0
        ]

    def _end_between(self, answer: dict[str, Any], shown: str, reply: dict[str, Any]) -> int:
        """The last end token between what an answer shows and a reply to it; where there is none, eos."""
        chat = [_QUESTION, answer, {**reply, "content": _REPLY}]
        text = self._template(chat, (), add_generation_prompt=False)
        end = text.find(_REPLY)
        begin = text.rfind(shown, 0, end)
        found = {text.rfind(token, begin, end): token for token in self._ends}
        place = max(found)
        if place < 0:
            return int(self._tokenizer.eos_token_id)
        return int(self._tokenizer.convert_tokens_to_ids(found[place]))

    def _entries(self, messages: Sequence[Message], start: int) -> list[dict[str, Any]]:
        """What the template is given of `messages[start:]`."""
        shown: dict[str, tuple[str, str]] = {}
        number = 0
        entries = []
        for at, message in enumerate(messages):
            ids = [
                self._shown_id(call, number + num) for num, call in enumerate(message.tool_calls)
            ]
            number += len(ids)
            for call, name in zip(message.tool_calls, ids, strict=True):
                shown[call.id] = (name, call.name)
            if at >= start:
                entries.append(self._entry(message, ids, shown))
        return entries

    def _entry(
        self, message: Message, ids: Sequence[str], shown: Mapping[str, tuple[str, str]]
    ) -> dict[str, Any]:
        if message.images:
            raise RequestError("this model takes no images")
        entry: dict[str, Any] = {"role": message.role, "content": self._plain(message.content)}
        if message.reasoning:
            entry["reasoning_content"] = self._plain(message.reasoning)
        if message.tool_calls:
            entry["tool_calls"] = list(map(self._call, message.tool_calls, ids))
        if message.role == "tool":
            called = shown.get(message.tool_call_id, (message.tool_call_id, ""))
            entry["tool_call_id"], entry["name"] = map(self._plain, called)
        return entry

    def _call(self, call: ToolCall, shown: str) -> dict[str, Any]:
        try:
            arguments: Any = json.loads(self._plain(call.arguments) or "{}")
        except ValueError:
            arguments = self._plain(call.arguments)
        if self._writes_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        function = {"name": self._plain(call.name), "arguments": arguments}
        return {"type": "function", "id": self._plain(shown), "function": function}

    def _shown_id(self, call: ToolCall, number: int) -> str:
        form = self._family.call_id if self._family else ""
        return form.format(name=call.name, number=number) or call.id

    @cached_property
    def _family(self) -> Family | None:
        return family(str(self._tokenizer.chat_template))

    @cached_property
    def _writes_text(self) -> bool:
        """Whether the template writes a call's arguments down as the text that they have to be then."""
        function = {"name": "f", "arguments": {"a": 1}}
        call = {"type": "function", "id": "f", "function": function}
        try:
            self._render(
                [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}], ()
            )
        except TypeError:
            return True
        return False

    def _render(self, chat: list[dict[str, Any]], tools: Sequence[Tool]) -> str:
        return self._template(chat, tools, add_generation_prompt=True)

    def _template(
        self, chat: list[dict[str, Any]], tools: Sequence[Tool], *, add_generation_prompt: bool
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            chat,
            tools=_offered(tools),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return str(text)

    def _plain(self, content: str) -> str:
        """`content` with the control tokens it spells broken up: a file may not end a turn."""
        for token in self._tokenizer.all_special_tokens:
            if token in content:
                content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))


def _opened(prompt: str) -> str:
    """The thought that a prompt begins for the answer; "" for none."""
    kept = prompt.rstrip("\n")
    return prompt[len(kept.removesuffix("<think>")) :] if kept.endswith("<think>") else ""


def _num_answered(history: Sequence[Message]) -> int:
    """How many messages there are up to the last answer."""
    answers = [at for at, message in enumerate(history) if message.role == "assistant"]
    return answers[-1] + 1 if answers else 0


def _pieces(tokenizer: Any) -> dict[str, Any]:
    """All that a fast tokenizer does to text but for padding and truncation; nothing, of others."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    whole: dict[str, Any] = json.loads(fast.to_str()) if fast else {}
    return {name: part for name, part in whole.items() if name not in {"padding", "truncation"}}


def _end_ids(model: Path, tokenizer: Any) -> set[int]:
    ends = {int(tokenizer.eos_token_id)}
    if (model / "generation_config.json").exists():
        given = GenerationConfig.from_pretrained(str(model)).eos_token_id
        ends |= set(given if isinstance(given, list) else () if given is None else (given,))
    return ends


def _offered(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in tools
    ] or None


def _called(parsed: Mapping[str, Any]) -> ToolCall:
    name, arguments = parsed["function"]["name"], parsed["function"]["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("not a tool call")
    return ToolCall("", name, json.dumps(arguments, ensure_ascii=False))
