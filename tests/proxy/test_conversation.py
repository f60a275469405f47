"""What was sampled comes back as it was sampled, whatever an agent does to its history."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from katcore.proxy.conversation import Conversations
from katcore.schema.call import Message, ToolCall
from tests.proxy.fakes import FakeEngine, text_of
from tests.trajectory.made import TOOLS, Recorder, sessions

SYSTEM = Message("system", "s")
LS = Message("assistant", "", tool_calls=(ToolCall("call_1", "bash", '{"command": "ls", "n": 1}'),))


def user(text: str) -> Message:
    return Message("user", text)


def shared(session: Recorder) -> list[tuple[str, int, int]]:
    return [(call.parent, call.num_shared_messages, call.num_shared) for call in session.calls]


def test_a_conversation_goes_on_from_the_recorded_ids() -> None:
    session = Recorder()
    history = [SYSTEM, user("a")]
    for text in ("x", "y"):
        history += [session.say(history, text), user("b")]
    session.say(history, "z")
    first, second, third = session.calls
    assert shared(session) == [("", 0, 0), ("c0", 3, first.num_ids), ("c1", 5, second.num_ids)]
    assert text_of(session.prompts[2]) == "S:s|U:a|A:x|U:b|A:y|U:b|A:"
    assert text_of(third.new_prompt_ids) == "U:b|A:"
    assert third.new_messages == (user("b"),)
    assert all(call.is_exact for call in session.calls)


def test_an_echo_that_differs_in_form_is_the_same_answer() -> None:
    echoes = [
        LS,
        replace(LS, tool_calls=(ToolCall("call1", "bash", '{"n":1,"command":"ls"}'),)),
        replace(LS, reasoning="I wonder", content="\n"),
    ]
    for echo in echoes:
        session = Recorder()
        session.say([user("a")], LS, TOOLS)
        out = Message("tool", "files", tool_call_id=echo.tool_calls[0].id)
        session.say([user("a"), echo, out], "done", TOOLS)
        assert shared(session)[1] == ("c0", 2, session.calls[0].num_ids)
        assert session.calls[1].is_exact


def test_an_answer_that_was_changed_is_made_from_its_text_and_counted() -> None:
    session = Recorder()
    session.say([user("a")], "one")
    session.say([user("a"), Message("assistant", "two"), user("b")], "x")
    session.say([user("a"), Message("assistant", "one"), user("b")], "y")
    assert [call.num_retokenised for call in session.calls] == [0, 1, 0]
    assert text_of(session.prompts[1]) == "U:a|A:two|U:b|A:"
    assert [call.parent for call in session.calls] == ["", "c0", "c0"]
    assert session.calls[1].num_shared == len("U:a|A:") - 2


def test_in_rewritten_history_the_answers_that_stand_keep_their_ids() -> None:
    """The engine tells of an answer's text in another way than it sampled it; here with an extra id."""

    class Odd(FakeEngine):
        def encode(self, messages, *, tools=(), start=0):  # type: ignore[no-untyped-def]
            ids = super().encode(messages, tools=tools, start=start)
            return tuple(number for number in ids if number != ord("q"))

    session = Recorder()
    session._conversations = Conversations(Odd())
    history = [user("a")]
    history += [session.say(history, "xq"), user("b")]
    history += [session.say(history, "yq"), user("c")]
    session.say(history, "z")
    session.say([user("A"), *history[1:]], "w")
    assert text_of(session.prompts[3]) == "U:A|A:xq|U:b|A:yq|U:c|A:"
    assert session.calls[3].is_exact
    assert session.calls[3].parent == ""


def test_a_passing_remark_forks_where_it_stood() -> None:
    session = Recorder()
    session.say([user("a"), user("now")], "x")
    session.say([user("a"), Message("assistant", "x"), user("b"), user("now")], "y")
    assert shared(session)[1] == ("c0", 1, len("U:a|") - 1)
    assert session.calls[1].is_exact


def test_other_tools_are_another_conversation() -> None:
    session = Recorder()
    session.say([user("a")], "x", TOOLS)
    session.say([user("a")], "y")
    assert [call.parent for call in session.calls] == ["", ""]
    assert [call.tools for call in session.calls] == [TOOLS, ()]


def test_a_cut_answer_is_not_continued_as_if_it_had_ended() -> None:
    session = Recorder()
    session.say([user("a")], "on")
    cut = session.calls[0]
    session._conversations = Conversations(FakeEngine())
    prompt = session._conversations.prompt([user("a")], ())
    generation = replace(cut.generation, finish="length", ids=cut.generation.ids[:-1])
    session._conversations.record(replace(cut, generation=generation), prompt)
    session.say([user("a"), Message("assistant", "on"), user("b")], "x")
    assert session.calls[1].num_retokenised == 1
    assert text_of(session.prompts[1]) == "U:a|A:on|U:b|A:"


@given(sessions())
def test_what_is_shared_is_the_parent_s(session: Recorder) -> None:
    whole = {
        call.call_id: prompt + call.generation.ids
        for call, prompt in zip(session.calls, session.prompts, strict=True)
    }
    for call, prompt in zip(session.calls, session.prompts, strict=True):
        assert prompt[: call.num_shared] == whole.get(call.parent, ())[: call.num_shared]
        assert call.num_shared <= len(prompt)


@given(sessions(), st.data())
def test_every_answer_in_a_prompt_stands_by_ids_it_was_given_in(
    session: Recorder, data: st.DataObject
) -> None:
    said = {call.generation.text: call.generation.ids for call in session.calls}
    for call, prompt in zip(session.calls, session.prompts, strict=True):
        if call.is_exact:
            answers = text_of(prompt).split("A:")[1:-1]
            assert all(answer.split("|")[0] in said for answer in answers)
