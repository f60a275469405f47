"""Model families in small: a tokenizer of bytes with the family's control tokens, and its chat format.

Where no package carries a family's chat template, the one here was written for these tests, and those of Kimi
and GLM are held to what `renderers` makes of the same conversations.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from trl import chat_template_utils as trl

from katcore.inference.bytes import write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer

_MARK = re.compile(r"</?\w|<[|｜]|[|｜]>|\[/?[A-Z]")


def words(min_size: int, max_size: int, exclude: list[Any]) -> st.SearchStrategy[str]:
    """Texts without marks, which no family escapes; some examples are strings of our own sources."""
    kinds = st.characters(codec="utf-8", exclude_categories=exclude)
    found = st.text(kinds, min_size=min_size, max_size=max_size)
    return found.filter(lambda text: not _MARK.search(text))


# After the results of tools the answer begins at once. No definition of a tool is shown to the model.
_DEEPSEEK_V31 = """{{ bos_token }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- set ns = namespace(asked=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% set ns.asked = true %}
{%- elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.role == 'assistant' %}
{%- if ns.asked %}{{ '<｜Assistant｜></think>' }}{% set ns.asked = false %}{% endif %}
{{- m.content }}
{%- if m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}
{%- for call in m.tool_calls -%}
{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments
   + '<｜tool▁call▁end｜>' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}
{{- '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}{{ '<｜Assistant｜></think>' }}{% endif %}"""
_KIMI_K2 = """{% if tools %}{{ '<|im_system|>tool_declare<|im_middle|>' }}
{{- tools | tojson(separators=(',', ':')) + '<|im_end|>' }}{% endif %}
{%- if messages[0].role != 'system' -%}
{{ '<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
{%- set kind = {'user': 'user', 'assistant': 'assistant'}.get(m.role, 'system') %}
{{- '<|im_' + kind + '|>' + (m.name or m.role) + '<|im_middle|>' }}
{%- if m.role == 'tool' %}{{ '## Return of ' + m.tool_call_id + '\n' }}{% endif %}
{{- m.content }}
{%- if m.tool_calls %}{{ '<|tool_calls_section_begin|>' }}
{%- for call in m.tool_calls -%}
{{ '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' }}
{{- call.function.arguments | tojson + '<|tool_call_end|>' }}
{%- endfor %}{{ '<|tool_calls_section_end|>' }}{% endif %}
{{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"""
# Answers are over where the next turn begins; thoughts are shown since the last question.
_GLM_47 = """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>
{{- '<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- elif m.role == 'system' %}{{ '<|system|>' + m.content }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|observation|>' }}{% endif %}
{{- '<tool_response>' + m.content + '</tool_response>' }}
{%- else %}{{ '<|assistant|>' }}
{%- if loop.index0 > ns.last and m.reasoning_content %}{{ '<think>' + m.reasoning_content }}{% endif %}
{{- '</think>' + m.content.strip() }}
{%- for call in m.tool_calls or () -%}
{{ '<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() -%}
{{ '<arg_key>' + key + '</arg_key><arg_value>' }}
{{- value if value is string else value | tojson }}{{ '</arg_value>' }}
{%- endfor %}{{ '</tool_call>' }}
{%- endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"""

_TOOL = "calls▁begin calls▁end call▁begin call▁end sep outputs▁begin outputs▁end output▁begin output▁end"
_DEEPSEEK = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *(f"<｜tool▁{name}｜>" for name in _TOOL.split()),
)
_KIMI = (
    *("[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
_GLM = (
    *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|observation|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
)
_GLM_ENDS = ("<|endoftext|>", "<|user|>", "<|observation|>")


@dataclass(frozen=True)
class Small:
    """A family's chat template, its control tokens beside those of the byte tokenizer, and which end answers.

    The first of `ends` is the tokenizer's eos, the others are in `generation_config.json`.
    """

    template: str
    ends: tuple[str, ...]
    control: tuple[str, ...] = ()


FAMILIES = {
    "qwen2.5": Small(trl.qwen2_5_chat_template, ("<|im_end|>",)),
    "qwen3": Small(trl.qwen3_chat_template, ("<|im_end|>",)),
    "qwen3-2507": Small(trl.qwen3_instruct_2507_chat_template, ("<|im_end|>",)),
    "qwen3.5": Small(trl.qwen3_5_nothink_chat_template, ("<|im_end|>",)),
    "qwen3.5-think": Small(trl.qwen3_5_think_chat_template, ("<|im_end|>",)),
    "qwen3.6": Small(trl.qwen3_6_chat_template, ("<|im_end|>",)),
    "qwen3.8": Small(trl.qwen3_8_chat_template, ("<|im_end|>",)),
    "llama3.1": Small(trl.llama3_1_chat_template, ("<|eot_id|>",)),
    "gpt-oss": Small(trl.gptoss_chat_template, ("<|call|>",)),
    "glm4.5": Small(trl.glm4moe_chat_template, _GLM_ENDS, _GLM),
    "glm4.7": Small(_GLM_47, _GLM_ENDS, _GLM),
    "deepseek-r1": Small(trl.deepseekv3_chat_template, ("<｜end▁of▁sentence｜>",), _DEEPSEEK),
    "deepseek-v3.1": Small(_DEEPSEEK_V31, ("<｜end▁of▁sentence｜>",), _DEEPSEEK),
    "kimi-k2": Small(_KIMI_K2, ("[EOS]", "<|im_end|>"), _KIMI),
}


def small(name: str, folder: Path) -> ChatTokenizer:
    """The family's tokenizer, written into `folder`."""
    family = FAMILIES[name]
    write_byte_tokenizer(folder, template=family.template, end=family.ends[0])
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in family.control])
    tokenizer.save(str(path))
    if "deepseek" in name:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"bos_token": _DEEPSEEK[0]}
        path.write_text(json.dumps(config))
    ends = [tokenizer.token_to_id(token) for token in family.ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return ChatTokenizer(folder)
