"""The chat formats of model families: what the template renders is read back as it was meant."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import chat_template_utils as trl

from katcore.errors import EngineError, RequestError
from katcore.inference.bytes import write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer
from katcore.inference.scripted import ScriptedEngine
from katcore.schema.call import EngineRequest, Message, Sampling, Tool, ToolCall

FAMILIES = {
    "qwen2.5": (trl.qwen2_5_chat_template, "<|im_end|>"),
    "qwen3": (trl.qwen3_chat_template, "<|im_end|>"),
    "qwen3-2507": (trl.qwen3_instruct_2507_chat_template, "<|im_end|>"),
    "qwen3.6": (trl.qwen3_6_chat_template, "<|im_end|>"),
    "llama3.1": (trl.llama3_1_chat_template, "<|eot_id|>"),
    "qwen3.5": (trl.qwen3_5_nothink_chat_template, "<|im_end|>"),
    "qwen3.5-think": (trl.qwen3_5_think_chat_template, "<|im_end|>"),
    "qwen3.8": (trl.qwen3_8_chat_template, "<|im_end|>"),
    "glm4-moe": (trl.glm4moe_chat_template, "<|observation|>"),
    "gpt-oss": (trl.gptoss_chat_template, "<|call|>"),
}
SCHEMA = (
    '{"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "integer"}},'
    ' "required": ["command"]}'
)
BASH = Tool("bash", "runs a command", SCHEMA)
_WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)


@pytest.fixture(scope="session", params=FAMILIES)
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    template, end = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("family")
    return ChatTokenizer(write_byte_tokenizer(folder, template=template, end=end))


def asks(*commands: str) -> Message:
    calls = (ToolCall(f"c{n}", "bash", _arguments(text)) for n, text in enumerate(commands))
    return Message("assistant", "", tool_calls=tuple(calls))


def _arguments(command: str) -> str:
    import json

    return json.dumps({"command": command, "n": 3}, ensure_ascii=False)


def parsed(calls: Any) -> list[Any]:
    import json

    return [(call.name, json.loads(call.arguments)) for call in calls]


@settings(max_examples=25, deadline=None)
@given(command=_WORDS)
def test_a_rendered_tool_call_is_read_back(chat: ChatTokenizer, command: str) -> None:
    message = asks(f"echo '{command.strip()}'")
    prompt = chat.encode([Message("user", "go")], tools=[BASH])
    text, reasoning, calls = chat.read(chat.answer_ids(message, [BASH]), prompt, [BASH])
    assert parsed(calls) == parsed(message.tool_calls)
    assert (text.strip(), reasoning) == ("", "")


def test_what_follows_a_tool_call_is_the_tail_of_the_whole(chat: ChatTokenizer) -> None:
    """Only what a family never shows again (the reasoning of earlier answers) may differ."""
    question, answer = Message("user", "go"), asks("ls -a")
    output = Message("tool", "file é\n", tool_call_id="c0")
    ids = chat.encode([question], tools=[BASH]) + chat.answer_ids(answer, [BASH])
    ids += chat.encode([question, answer, output], tools=[BASH], start=2)
    whole = chat.encode([question, answer, output], tools=[BASH])
    text, expected = (chat._tokenizer.decode(list(item)) for item in (ids, whole))
    for thought in ("<think>\n\n</think>\n\n", "<think></think>"):
        text, expected = text.replace(thought, ""), expected.replace(thought, "")
    assert text == expected


def test_text_that_only_looks_like_a_tool_call_stays_text(chat: ChatTokenizer) -> None:
    for text in ("<tool_call>\n{broken</tool_call>", '{"name": 3}', "plain"):
        ids = chat._ids(text)
        said, _, calls = chat.read((*ids, chat.end_id), (), [BASH])
        assert not calls
        assert said.strip()


async def test_a_script_may_ask_for_tools(chat: ChatTokenizer) -> None:
    calls = (ToolCall("", "bash", _arguments("ls")),)
    engine = ScriptedEngine(chat, [calls, "done"])
    messages = (Message("user", "go"),)
    ids = engine.encode(messages, tools=[BASH])
    made = await engine.generate(EngineRequest("s", ids, Sampling(), messages, (BASH,)))
    assert (made.tool_calls, made.text, made.origin) == (calls, "", "scripted")
    assert parsed(chat.read(made.ids, ids, [BASH])[2]) == parsed(calls)


def test_reasoning_is_told_from_the_answer(tmp_path: Path) -> None:
    template, end = FAMILIES["qwen3"]
    chat = ChatTokenizer(write_byte_tokenizer(tmp_path, template=template, end=end))
    ids = chat._ids("<think>\nhm\n</think>\n\n42<|im_end|>")
    assert chat.read(ids) == ("42", "hm", ())


def test_images_are_refused(chat: ChatTokenizer) -> None:
    with pytest.raises(RequestError, match="no images"):
        chat.encode([Message("user", "look", images=("data:image/png;base64,AA",))])


def test_a_template_without_tools_says_so(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    chat = ChatTokenizer(write_byte_tokenizer(tmp_path, template=template))
    with pytest.raises(EngineError, match="does not render tool calls"):
        chat.answer_ids(asks("ls"), [BASH])
