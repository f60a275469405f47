"""The chat formats of model families: what the template renders is read back as it was meant."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from katcore.errors import EngineError, RequestError
from katcore.inference.bytes import write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer
from katcore.inference.scripted import ScriptedEngine
from katcore.schema.call import EngineRequest, Message, Sampling, Tool, ToolCall
from tests.inference.families import FAMILIES, small, words

SCHEMA = (
    '{"type": "object", "properties": {"command": {"type": "string"}, "n": {"type": "integer"}},'
    ' "required": ["command"]}'
)
BASH = Tool("bash", "runs a command", SCHEMA)
ONE_CALL = ("llama3.1", "gpt-oss")
"""Families whose chat templates write one call in an answer, and no more."""
_WORDS = words(0, 20, ["Cc", "Cs"])


@pytest.fixture(scope="session", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def chat(name: str, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return small(name, tmp_path_factory.mktemp("family"))


def asks(*commands: str) -> Message:
    calls = (ToolCall(f"c{n}", "bash", _arguments(text)) for n, text in enumerate(commands))
    return Message("assistant", "", tool_calls=tuple(calls))


def _arguments(command: str) -> str:
    return json.dumps({"command": command, "n": 3}, ensure_ascii=False)


def parsed(calls: Any) -> list[Any]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


@settings(max_examples=25, deadline=None)
@given(command=_WORDS)
def test_a_rendered_tool_call_is_read_back(chat: ChatTokenizer, command: str) -> None:
    message = asks(f"echo '{command.strip()}'")
    prompt = chat.encode([Message("user", "go")], tools=[BASH])
    text, reasoning, calls = chat.read(chat.answer_ids(message, [BASH]), prompt, [BASH])
    assert parsed(calls) == parsed(message.tool_calls)
    assert (text.strip(), reasoning) == ("", "")


def test_what_follows_tool_calls_is_the_tail_of_the_whole(name: str, chat: ChatTokenizer) -> None:
    """Only what a family never shows again (the reasoning of earlier answers) may differ."""
    commands = ("ls -a",) if name in ONE_CALL else ("ls -a", "pwd")
    question, answer = Message("user", "go"), asks(*commands)
    outputs = [Message("tool", f"file é{n}\n", tool_call_id=f"c{n}") for n in range(len(commands))]
    ids = chat.encode([question], tools=[BASH]) + chat.answer_ids(answer, [BASH])
    ids += chat.encode([question, answer, *outputs], tools=[BASH], start=2)
    whole = chat.encode([question, answer, *outputs], tools=[BASH])
    text, expected = (chat._tokenizer.decode(list(item)) for item in (ids, whole))
    for thought in (
        "<think>\n\n</think>\n\n",
        "<think></think>",
        "<think>",
        "\n</think>\n\n",
        "</think>",
    ):
        text, expected = text.replace(thought, ""), expected.replace(thought, "")
    assert text == expected


def test_parallel_calls_are_read_in_their_order(name: str, chat: ChatTokenizer) -> None:
    if name in ONE_CALL:
        return
    message = asks("ls", "pwd", "ls")
    prompt = chat.encode([Message("user", "go")], tools=[BASH])
    text, _, calls = chat.read(chat.answer_ids(message, [BASH]), prompt, [BASH])
    assert parsed(calls) == parsed(message.tool_calls)
    assert not text.strip()


def test_a_text_is_read_as_text_also_where_the_template_began_a_thought(
    chat: ChatTokenizer,
) -> None:
    prompt = chat.encode([Message("user", "go")])
    ids = chat.answer_ids(Message("assistant", "done"), (), [Message("user", "go")])
    assert chat.read(ids, prompt) == ("done", "", ())
    if chat._tokenizer.decode(list(prompt)).rstrip().endswith("<think>"):
        ids = chat.answer_ids(Message("assistant", "done", "hm"), ())
        assert chat.read(ids, prompt) == ("done", "hm", ())


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
    chat = small("qwen3", tmp_path)
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
