"""What chat templates leave unsaid of model families: how their answers are read, how they name their calls.

Response templates are in the notation of transformers, whose `parse_response` does the reading. They stand in
where the tokenizer brings none. A family is known by the control tokens that its chat template writes, so
that one which somebody changed is still known. TRL, which is asked for all others, knows a chat template by
its whole text, and of GLM's answers loses what is said before a call.
"""

from dataclasses import dataclass
from typing import Any

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write calls. `marks` are what the chat template has to have in it.

    `call_id` is how the template's calls are named by their `name` and `number` in the conversation, where
    the model reads these names; "" where it never sees any.
    """

    marks: tuple[str, ...]
    response: dict[str, Any]
    call_id: str = ""


def _response(anchor: str, end: str, calls: dict[str, Any], begin: str = "") -> dict[str, Any]:
    """`begin` is where calls begin in a thought that is not finished after them either."""
    close = r"</think>\s*" + (rf"|(?=\s*{begin}(?![\s\S]*</think>))" if begin else "")
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": anchor,
        "fields": {
            "reasoning_content": {
                "open_pattern": r"\s*<think>",
                "close_pattern": close,
                "content": "text",
            },
            "tool_calls": {"repeats": True, "content": "json", "transform": _CALL} | calls,
            "content": {"close_pattern": end, "content": "text", "repeats": True, "join": "\n"},
        },
    }


def _deepseek(begin: str, end: str) -> dict[str, Any]:
    """An answer may begin after the results of tools, without a word that it does."""
    return _response(
        r"<｜Assistant｜>(?:</think>)?|<｜tool▁outputs?▁end｜>",
        r"<｜end▁of▁sentence｜>",
        {
            "open_pattern": rf"\s*(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>{begin}",
            "close_pattern": rf"{end}<｜tool▁call▁end｜>(?:<｜tool▁calls▁end｜>)?",
        },
    )


_NAME = r"(?P<name>[^<\n]+)"

FAMILIES = (
    # DeepSeek V3 and R1.
    Family(
        ("<｜tool▁sep｜>", "```json"),
        _deepseek(rf"[^<\n]*<｜tool▁sep｜>{_NAME}\n```json\n", r"\n```"),
    ),
    # DeepSeek V3.1.
    Family(("<｜tool▁sep｜>",), _deepseek(rf"{_NAME}<｜tool▁sep｜>", "")),
    # Kimi K2.
    Family(
        ("<|tool_calls_section_begin|>",),
        _response(
            r"<\|im_assistant\|>assistant<\|im_middle\|>(?:<think></think>)?",
            r"<\|im_end\|>",
            {
                "open_pattern": (
                    r"\s*(?:<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>\s*(?:functions\.)?"
                    r"(?P<name>[^<:\s]+)(?::\d+)?\s*<\|tool_call_argument_begin\|>"
                ),
                "close_pattern": r"<\|tool_call_end\|>\s*(?:<\|tool_calls_section_end\|>)?",
            },
            begin=r"<\|tool_calls_section_begin\|>",
        ),
        call_id="functions.{name}:{number}",
    ),
    # GLM from 4.5 on. Values are text; the tool's schema says what they are.
    Family(
        ("<tool_call>", "<arg_key>"),
        _response(
            r"<\|assistant\|>(?:\n?<think></think>|</think>)?",
            r"<\|(?:user|observation|endoftext)\|>",
            {
                "open_pattern": r"\s*<tool_call>\s*(?P<name>[\w.:/-]+)\s*(?=<arg_key>|</tool_call>)",
                "close_pattern": r"</tool_call>\s*",
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": (
                        r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
                    ),
                    "value_parser": {"name": "text"},
                },
            },
            begin="<tool_call>",
        ),
    ),
)


def family(chat_template: str) -> Family | None:
    """The first family all of whose marks are in a chat template."""
    return next((one for one in FAMILIES if all(mark in chat_template for mark in one.marks)), None)
