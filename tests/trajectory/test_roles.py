"""Roles come from structure: who took up which answer, and when."""

from katcore.schema.call import Message, Tool, ToolCall
from katcore.trajectory.roles import find_roles
from tests.trajectory.made import TOOLS, Recorder

SYSTEM = Message("system", "You are an agent.")
OTHER = (Tool("read", "reads", "{}"),)


def user(text: str) -> Message:
    return Message("user", text)


def tool(text: str) -> Message:
    return Message("tool", text, tool_call_id="c1")


def asks(name: str = "bash") -> Message:
    return Message("assistant", "", tool_calls=(ToolCall("c1", name, '{"command": "ls"}'),))


def test_a_plain_conversation_is_main() -> None:
    session = Recorder()
    history = [SYSTEM, user("fix it")]
    history += [session.say(history, asks(), TOOLS), tool("a")]
    session.say(history, "done", TOOLS)
    assert find_roles(session.calls) == ["main", "main"]
    assert find_roles([]) == []


def test_an_answer_that_was_asked_for_again_is_discarded() -> None:
    session = Recorder()
    history = [SYSTEM, user("fix it")]
    session.say(history, "lost", TOOLS)
    history += [session.say(history, asks(), TOOLS), tool("a")]
    session.say(history, "lost, too", TOOLS)
    session.say(history, "done", TOOLS)
    assert find_roles(session.calls) == ["discarded", "main", "discarded", "main"]


def test_a_title_is_auxiliary_wherever_it_comes() -> None:
    for place in (0, 1, 2):
        session = Recorder()
        history = [SYSTEM, user("fix it")]
        for number in range(3):
            if number == place:
                session.say([Message("system", "Name it."), user("fix it")], "A title")
            history += [session.say(history, asks(), TOOLS), tool(str(number))]
        expected = ["main"] * 3
        expected.insert(place, "auxiliary")
        assert find_roles(session.calls) == expected


def test_a_conversation_within_another_is_a_sub_agent_s() -> None:
    session = Recorder()
    history = [SYSTEM, user("fix it")]
    history += [session.say(history, asks("agent"), TOOLS)]
    inner = [SYSTEM, user("look around")]
    inner += [session.say(inner, asks(), OTHER), tool("files")]
    session.say(inner, "I found it", OTHER)
    history += [tool("I found it")]
    session.say(history, "done", TOOLS)
    assert find_roles(session.calls) == ["main", "subagent", "subagent", "main"]


def test_sub_agents_side_by_side_and_within_each_other() -> None:
    session = Recorder()
    history = [SYSTEM, user("fix it")]
    history += [session.say(history, asks("agent"), TOOLS)]
    first, second = [SYSTEM, user("one")], [SYSTEM, user("two")]
    first += [session.say(first, asks("agent"), OTHER)]
    second += [session.say(second, asks(), OTHER), tool("b")]
    session.say([SYSTEM, user("deeper")], "leaf", OTHER)
    session.say(second, "two is done", OTHER)
    session.say([*first, tool("leaf")], "one is done", OTHER)
    session.say([*history, tool("both")], "done", TOOLS)
    assert find_roles(session.calls) == ["main", *["subagent"] * 5, "main"]


def test_after_a_summary_it_goes_on_after_a_compaction() -> None:
    summary = "Summary: the bug is in parse(), line 4; the fix is to add one."
    session = Recorder()
    history = [SYSTEM, user("fix it")]
    history += [session.say(history, asks(), TOOLS), tool("a")]
    session.say([*history[:-1], tool("a\nNow sum up what was done.")], summary, TOOLS)
    history = [SYSTEM, user(f"So far: {summary} Go on.")]
    history += [session.say(history, asks(), TOOLS), tool("b")]
    session.say(history, "done", TOOLS)
    assert find_roles(session.calls) == [
        "main", "auxiliary", "post-compaction", "post-compaction",
    ]  # fmt: skip


def test_a_summary_by_a_request_without_tools_is_auxiliary() -> None:
    summary = "Summary: the bug is in parse(), line 4; the fix is to add one."
    session = Recorder()
    history = [SYSTEM, user("fix it")]
    history += [session.say(history, asks(), TOOLS), tool("a")]
    session.say([Message("system", "Sum up."), user("fix it, ls, a")], summary)
    history = [SYSTEM, user("What did we do so far?"), Message("assistant", summary), user("On.")]
    session.say(history, "done", TOOLS)
    assert find_roles(session.calls) == ["main", "auxiliary", "post-compaction"]


def test_a_remark_that_is_not_kept_breaks_no_conversation() -> None:
    session = Recorder()
    history, remark = [SYSTEM, user("fix it")], user("<<<it is noon>>>")
    for number in range(3):
        history += [session.say([*history, remark], asks(), TOOLS), tool(str(number))]
    session.say([*history, remark], "done", TOOLS)
    assert find_roles(session.calls) == ["main"] * 4


def test_without_any_tools_the_conversation_is_main() -> None:
    session = Recorder()
    history = [user("fix it")]
    for number in range(3):
        history += [session.say(history, f"ls {number}"), user("out")]
    assert find_roles(session.calls) == ["main"] * 3


def test_a_branch_that_asked_something_else_is_auxiliary() -> None:
    session = Recorder()
    history = [SYSTEM, user("fix it")]
    history += [session.say(history, asks(), TOOLS)]
    session.say([*history, tool("a"), user("Is it safe?")], "yes", TOOLS)
    session.say([*history, tool("a")], "done", TOOLS)
    assert find_roles(session.calls) == ["main", "auxiliary", "main"]
