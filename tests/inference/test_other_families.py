"""DeepSeek, Kimi and GLM: held to `renderers`, another implementation, and to what such models say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from renderers.deepseek_r1 import DeepSeekR1Renderer
from renderers.glm5 import GLM5Renderer
from renderers.glm45 import GLM45Renderer
from renderers.kimi_k2 import KimiK2Renderer

from katcore.inference.chat import ChatTokenizer, _offered
from katcore.inference.family import family
from katcore.inference.scripted import ScriptedEngine
from katcore.schema.call import EngineRequest, Message, Sampling, ToolCall
from tests.inference.families import FAMILIES, small, words
from tests.inference.test_families import BASH, asks, parsed

OTHERS = {
    "deepseek-r1": DeepSeekR1Renderer,
    "glm4.5": GLM45Renderer,
    "glm4.7": GLM5Renderer,
    "kimi-k2": KimiK2Renderer,
}
_WORDS = words(1, 9, ["C", "Z"])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("others")


@pytest.fixture(scope="session", params=OTHERS)
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[ChatTokenizer, Any]:
    chat = small(request.param, folder / request.param)
    return chat, OTHERS[request.param](chat._tokenizer)


def conversation() -> list[Message]:
    call = Message("assistant", "I look.", tool_calls=asks("ls é").tool_calls)
    return [
        Message("system", "You help."),
        Message("user", "go"),
        call,
        Message("tool", "a b\n", tool_call_id="c0"),
        Message("assistant", "There it is."),
        Message("user", "more"),
    ]


def test_a_conversation_has_the_ids_that_it_has_elsewhere(pair: tuple[ChatTokenizer, Any]) -> None:
    chat, other = pair
    entries = chat._entries(conversation(), 0)
    for entry in entries:
        for call in entry.get("tool_calls", ()):
            function = call["function"]
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    # Kimi's own tokenizer sorts the keys of tools, which a chat template cannot.
    tools = () if isinstance(other, KimiK2Renderer) else (BASH,)
    ids = other.render_ids(entries, tools=_offered(tools), add_generation_prompt=True)
    assert chat.encode(conversation(), tools=tools) == tuple(ids)


@settings(max_examples=25, deadline=None)
@given(
    text=_WORDS | st.just(""),
    reasoning=_WORDS | st.just(""),
    commands=st.lists(_WORDS, min_size=1, max_size=3),
)
def test_an_answer_is_read_as_elsewhere(
    pair: tuple[ChatTokenizer, Any], text: str, reasoning: str, commands: list[str]
) -> None:
    chat, other = pair
    prompt = chat.encode([Message("user", "go")], tools=[BASH])
    message = Message("assistant", text, reasoning, asks(*commands).tool_calls)
    ids = chat.answer_ids(message, [BASH])
    said, thought, calls = chat.read(ids, prompt, [BASH])
    theirs = other.parse_response(list(ids), tools=_offered([BASH]), prompt_ids=list(prompt))
    assert said == theirs.content.strip()
    assert thought == (theirs.reasoning_content or "").strip()
    assert parsed(calls) == [(call.name, call.arguments) for call in theirs.tool_calls]
    assert parsed(calls) == parsed(message.tool_calls)


_DEEPSEEK_CALL = (
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>bash\n```json\n"
    '{"command": "ls"}\n```<｜tool▁call▁end｜>'
)
_V31_CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>bash<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_KIMI_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.bash:0<|tool_call_argument_begin|>"
    '{"command": "ls"}<|tool_call_end|><|tool_calls_section_end|>'
)
_GLM_CALL = "<tool_call>bash<arg_key>command</arg_key><arg_value>ls</arg_value></tool_call>"
SAID = [
    ("deepseek-r1", f"hm</think>\n\nI look{_DEEPSEEK_CALL}", ("I look", "hm", 1)),
    ("deepseek-r1", f"hm</think>{_DEEPSEEK_CALL}\n{_DEEPSEEK_CALL}", ("", "hm", 2)),
    ("deepseek-r1", "hm, and so on", ("", "hm, and so on", 0)),
    ("deepseek-v3.1", f"ok{_V31_CALL}", ("ok", "", 1)),
    ("kimi-k2", f"<think>hm</think>I look{_KIMI_CALL} and wait", ("I look\nand wait", "hm", 1)),
    ("kimi-k2", f"<think>hm{_KIMI_CALL}", ("", "hm", 1)),
    ("kimi-k2", f"<think>say {_KIMI_CALL}?</think>no", ("no", f"say {_KIMI_CALL}?", 0)),
    ("glm4.5", "\n<think>hm</think>\nI look\n" + _GLM_CALL, ("I look", "hm", 1)),
    ("glm4.7", f"hm</think>I look{_GLM_CALL}{_GLM_CALL}", ("I look", "hm", 2)),
    ("glm4.7", f"hm{_GLM_CALL}", ("", "hm", 1)),
]


@pytest.mark.parametrize(("name", "said", "expected"), SAID)
def test_what_models_say(
    folder: Path, name: str, said: str, expected: tuple[str, str, int]
) -> None:
    chat = small(name, folder / name)
    prompt = chat.encode([Message("user", "go")], tools=[BASH])
    text, reasoning, calls = chat.read((*chat._ids(said), chat.end_id), prompt, [BASH])
    assert (text, reasoning, len(calls)) == expected
    assert all(call.name == "bash" for call in calls)


def test_a_call_that_is_not_whole_stays_text(folder: Path) -> None:
    chat = small("deepseek-v3.1", folder / "deepseek-v3.1")
    text, _, calls = chat.read(chat._ids(_V31_CALL.replace("{}", '{"command": ')), (), [BASH])
    assert not calls
    assert '{"command": ' in text


@pytest.mark.parametrize(
    ("name", "after_text", "after_call"),
    [
        ("kimi-k2", "<|im_end|>", "<|im_end|>"),
        ("glm4.5", "<|user|>", "<|observation|>"),
        ("glm4.7", "<|user|>", "<|observation|>"),
        ("deepseek-v3.1", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ],
)
def test_an_answer_ends_as_the_template_ends_it(
    folder: Path, name: str, after_text: str, after_call: str
) -> None:
    chat = small(name, folder / name)
    ends = [chat.text_ids("hi")[-1], chat.answer_ids(asks("ls"), [BASH])[-1]]
    assert [chat.token_texts([end])[end] for end in ends] == [after_text, after_call]


async def test_kimi_is_shown_its_own_names_of_calls_whatever_the_agent_calls_them(
    folder: Path,
) -> None:
    chat = small("kimi-k2", folder / "kimi-k2")
    calls = tuple(ToolCall("", "bash", json.dumps({"command": name})) for name in "ab")
    engine = ScriptedEngine(chat, [calls, calls[:1], "done"])
    messages = [Message("user", "go")]
    ids = chat.encode(messages, tools=[BASH])
    for turn in range(2):
        made = await engine.generate(EngineRequest("s", ids, Sampling(), tuple(messages), (BASH,)))
        named = [replace(call, id=f"toolu_{turn}{n}") for n, call in enumerate(made.tool_calls)]
        messages.append(Message("assistant", "", tool_calls=tuple(named)))
        messages += [Message("tool", "ok", tool_call_id=call.id) for call in named]
        start = len(messages) - len(named)
        ids = (*ids, *made.ids, *chat.encode(messages, tools=[BASH], start=start))
    assert ids == chat.encode(messages, tools=[BASH])
    text = chat._tokenizer.decode(list(ids))
    assert [text.count(f"## Return of functions.bash:{n}\n") for n in range(4)] == [1, 1, 1, 0]
    assert [text.count(f"<|tool_call_begin|>functions.bash:{n}<") for n in range(4)] == [1, 1, 1, 0]


def test_a_family_is_known_by_its_control_tokens() -> None:
    known = {name: family(made.template) for name, made in FAMILIES.items()}
    own = {name for name, found in known.items() if found}
    assert own == {"deepseek-r1", "deepseek-v3.1", "kimi-k2", "glm4.5", "glm4.7"}
    assert known["glm4.5"] is known["glm4.7"]
    assert known["deepseek-r1"] is not known["deepseek-v3.1"]
    changed = FAMILIES["kimi-k2"].template.replace("You are Kimi", "You are")
    assert family(changed) is known["kimi-k2"]
