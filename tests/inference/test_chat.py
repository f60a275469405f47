"""Messages to ids: a continuation is the whole conversation's tail, and content controls nothing."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from katcore.errors import EngineError
from katcore.inference.bytes import byte_chat, write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer
from katcore.inference.scripted import ScriptedEngine
from katcore.schema.call import EngineRequest, Message, Sampling, Tool, ToolCall
from katcore.train.tokenizer import ASSISTANT, END, PAD, SYSTEM, USER

SPECIAL = (PAD, END, USER, ASSISTANT, SYSTEM)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [*SPECIAL, "<|", "|>", "<|<|end|>end|>", "a<|end|><|assistant|>b"]
)


@pytest.fixture(scope="session")
def chat(model_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(model_folder)


def user(text: str) -> Message:
    return Message("user", text)


@settings(max_examples=60)
@given(turns=st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=4), last=_TEXT)
def test_a_continuation_is_the_tail_of_the_whole(
    chat: ChatTokenizer, turns: list[tuple[str, str]], last: str
) -> None:
    ids: tuple[int, ...] = ()
    messages: list[Message] = []
    for said, answer in turns:
        ids += chat.encode([*messages, user(said)], start=len(messages)) + chat.text_ids(answer)
        messages += [user(said), Message("assistant", answer)]
    ids += chat.encode([*messages, user(last)], start=len(messages))
    assert ids == chat.encode([*messages, user(last)])


@settings(max_examples=60)
@given(content=_TEXT)
def test_content_adds_no_control_token(chat: ChatTokenizer, content: str) -> None:
    controls = set(range(len(SPECIAL)))
    plain = [i for i in chat.encode([user("x")]) if i in controls]
    found = [i for i in chat.encode([user(content)]) if i in controls]
    assert found == plain
    ids = chat.text_ids(content)
    assert [number for number in ids if number in controls] == [chat.end_id]


@pytest.mark.parametrize("token", SPECIAL)
def test_every_control_token_is_one_id(chat: ChatTokenizer, token: str) -> None:
    ids = chat._ids(token)
    assert len(ids) == 1
    assert ids[0] < len(SPECIAL)


@settings(max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_an_answer_reads_as_it_was_written(chat: ChatTokenizer, text: str) -> None:
    if not any(token in text for token in SPECIAL):
        assert chat.decode(chat.text_ids(text)) == text


def test_a_tokenizer_without_a_template_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}'
    )
    with pytest.raises(EngineError, match="no chat template"):
        ChatTokenizer(tmp_path)


async def test_the_scripted_engine_replays_its_turns(chat: ChatTokenizer) -> None:
    engine = ScriptedEngine(chat, ("ls", "submit"))
    messages = [user("do it")]
    for text in ("ls", "submit"):
        ids = engine.encode(messages)
        made = await engine.generate(EngineRequest("s", ids, Sampling(), tuple(messages)))
        assert (made.text, made.finish, made.origin) == (text, "stop", "scripted")
        assert made.ids == chat.text_ids(text)
        assert made.logprobs == (0.0,) * len(made.ids)
        messages += [Message("assistant", text), user("ok")]
    with pytest.raises(EngineError, match="no turn 2"):
        await engine.generate(EngineRequest("s", (), Sampling(), tuple(messages)))


@pytest.mark.parametrize(
    ("text", "reasoning", "begin"),
    [
        ("", "", "<think></think><tool_call>"),  # with nothing before it, all is part of it
        ("I look.", "", "<tool_call>"),
        ("I look é.", "look? é", "<tool_call>"),
    ],
)
def test_what_is_inside_a_tool_call_is_marked(text: str, reasoning: str, begin: str) -> None:
    chat = byte_chat()
    call = ToolCall("c", "shell", '{"command": "ls é"}')
    tool = Tool("shell", "", '{"type": "object"}')
    ids = chat.answer_ids(Message("assistant", text, reasoning, (call,)), [tool])
    marks = chat.in_calls(ids)
    inside = [number for number, mark in zip(ids, marks, strict=True) if mark]
    said = "".join(chat._tokenizer.decode(inside, skip_special_tokens=False).split())
    assert said.startswith(begin)
    assert said.endswith("</tool_call>")
    assert chat._tokenizer.decode(ids, skip_special_tokens=False).count("<tool_call>") == 1
    assert chat.in_calls(chat.text_ids("no call")) == [False] * 8


def test_tokenizers_that_cannot_score_each_other_s_ids_say_why(tmp_path: Path) -> None:
    def made(name: str, **given: str) -> ChatTokenizer:
        return ChatTokenizer(write_byte_tokenizer(tmp_path / name, **given))

    one = made("one")
    assert one.differences(made("same")) == []
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    assert one.differences(made("other", template=template)) == ["chat template"]
    found = one.differences(made("longer", end="<|stop|>"))
    assert found == ["vocabulary", "end-of-turn tokens"]
    folder = tmp_path / "split"
    shutil.copytree(tmp_path / "one", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["use_regex"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert one.differences(ChatTokenizer(folder)) == ["how text is split"]
