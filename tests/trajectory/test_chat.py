"""Chat rows: whole conversations, shortened without tearing a call from its result, and loadable."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from pydantic import ValidationError

from katcore.schema.call import Message, Tool, ToolCall
from katcore.schema.rollout import Outcome, Rollout, Verdict
from katcore.trajectory.chat import ChatConfig, ChatFormatter
from katcore.trajectory.conversation import conversation, leaves
from tests.trajectory.made import TOOLS, Recorder, rollout, sessions

SYSTEM = Message("system", "You are an agent.")
TASK = Message("user", "fix it")


def rows(*made: Rollout, **options: Any) -> list[dict[str, Any]]:
    return list(ChatFormatter(ChatConfig(**options)).samples(made))


def asks(number: int) -> Message:
    calls = (
        ToolCall(f"a{number}", "bash", json.dumps({"command": f"ls {number}"})),
        ToolCall(f"b{number}", "bash", json.dumps({"command": f"cat {number}"})),
    )
    return Message("assistant", f"look {number}", tool_calls=calls)


def worked(num: int, failing: int = -1) -> Rollout:
    """`num` turns with two tool calls each, then one without."""
    session = Recorder()
    history = [SYSTEM, TASK]
    for number in range(num):
        history.append(session.say(history, asks(number), TOOLS))
        result = "Error: no such file" if number == failing else f"out {number}"
        history.append(Message("tool", result, tool_call_id=f"a{number}"))
        history.append(Message("tool", f"text {number}", tool_call_id=f"b{number}"))
    session.say(history, "done", TOOLS)
    return rollout(session.calls, scaffold="opencode 1.2")


def contents(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


def test_a_row_is_the_conversation_with_its_tools_and_facts() -> None:
    (row,) = rows(worked(1))
    asked = row["messages"][2]
    assert [message["role"] for message in row["messages"]] == [
        "system", "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    assert asked["tool_calls"][0] == {
        "id": "a0",
        "type": "function",
        "function": {"name": "bash", "arguments": '{"command": "ls 0"}'},
    }
    assert row["messages"][3]["tool_call_id"] == "a0"
    assert [message["train"] for message in row["messages"]] == [
        False, False, True, False, False, True,
    ]  # fmt: skip
    assert row["tools"] == [
        {
            "type": "function",
            "function": {"name": "bash", "description": "runs a command", "parameters": {}},
        }
    ]
    assert row["katcore"] == {
        "rollout_id": "s",
        "task_id": "t",
        "reward": 1.0,
        "outcome": "scored",
        "scaffold": "opencode 1.2",
        "num_dropped_messages": 0,
    }


def test_reasoning_and_images_are_kept() -> None:
    session = Recorder()
    picture = Message("user", "see", images=("data:image/png;base64,AA==",))
    session.say([picture], Message("assistant", "a cat"))
    made = rollout(session.calls)
    turn = replace(made.trajectory.turns[0], reasoning="it has ears")
    made = replace(made, trajectory=replace(made.trajectory, turns=(turn,)))
    (row,) = rows(made)
    assert row["messages"][0]["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    assert row["messages"][1]["reasoning_content"] == "it has ears"


@given(sessions())
def test_each_leaf_has_a_row_and_each_kept_answer_is_trained(session: Recorder) -> None:
    made = rollout(session.calls)
    turns = made.trajectory.turns
    for number in range(len(turns)):
        *asked, answer = conversation(made.trajectory, number)
        assert tuple(said.message for said in asked) == made.trajectory.prompt(number)
        assert (answer.message, answer.turn) == (turns[number].message, number)
    kept = {at for at, turn in enumerate(turns) if turn.role in ("main", "post-compaction")}
    ends = leaves(turns, kept)
    held = {said.turn for at in ends for said in conversation(made.trajectory, at)}
    assert kept <= held
    found = rows(made)
    assert len(found) == len(ends)
    assert all(row["messages"][-1]["train"] for row in found)
    for row in found:
        assert all(
            message["role"] == "assistant" for message in row["messages"] if message["train"]
        )


@given(sessions())
def test_merged_rows_train_each_answer_at_least_once(session: Recorder) -> None:
    made = rollout(session.calls)
    kept = [turn for turn in made.trajectory.turns if turn.role in ("main", "post-compaction")]
    trained = [
        message["content"].strip()
        for row in rows(made, merge=True)
        for message in row["messages"]
        if message["train"]
    ]
    assert {turn.text.strip() for turn in kept} == set(trained)
    assert len(rows(made, merge=True)) <= len(rows(made))


def test_a_conversation_with_passing_remarks_is_one_row_if_merged() -> None:
    session = Recorder()
    history, remark = [SYSTEM, TASK], Message("user", "it is noon")
    for number in range(3):
        history += [session.say([*history, remark], asks(number), TOOLS)]
        history += [Message("tool", f"out {number}", tool_call_id=f"a{number}")]
    session.say([*history, remark], "done", TOOLS)
    made = rollout(session.calls)
    assert len(rows(made)) == 4
    (row,) = rows(made, merge=True)
    assert [message["train"] for message in row["messages"] if message["role"] == "assistant"] == [
        True
    ] * 4


@pytest.mark.parametrize("options", [{"max_turns": 3}, {"max_chars": 130}])
def test_turns_are_taken_from_the_middle_with_their_results(options: dict[str, int]) -> None:
    (row,) = rows(worked(6), keep_last=2, **options)
    assert contents(row)[:2] == ["You are an agent.", "fix it"]
    assert contents(row)[-4:] == ["look 5", "out 5", "text 5", "done"]
    called = [call["id"] for message in row["messages"] for call in message.get("tool_calls", ())]
    answered = [message["tool_call_id"] for message in row["messages"] if message["role"] == "tool"]
    assert called == answered
    assert row["katcore"]["num_dropped_messages"] == 19 + 2 - len(row["messages"])


def test_what_cannot_be_made_short_enough_has_no_row() -> None:
    assert not rows(worked(6), keep_last=6, max_chars=60)
    assert len(rows(worked(6), keep_last=7, max_chars=10_000)) == 1


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_last": 3, "max_turns": 2}, {"x": 1}])
def test_options_that_do_not_fit_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        ChatConfig(**options)  # type: ignore[arg-type]


def test_the_same_conversation_is_dropped_whatever_its_ids_are() -> None:
    first = worked(2)
    second = json.dumps(rows(first)).replace('"a0"', '"z0"')
    assert json.loads(second) != rows(first)
    renamed = replace(first, id="other")
    assert len(rows(first, renamed)) == 2
    assert len(rows(first, renamed, worked(1), dedupe=True)) == 2


def test_answers_that_an_error_came_back_to_are_not_trained() -> None:
    (row,) = rows(worked(3, failing=1), mask_failed=("Error:",))
    trained = [message["train"] for message in row["messages"] if message["role"] == "assistant"]
    assert trained == [True, False, True, True]


def test_without_tool_calls_what_came_back_is_the_next_message() -> None:
    session = Recorder()
    history = [TASK]
    history += [session.say(history, "ls x"), Message("user", "[exit 2]\nls: x")]
    session.say(history, "submit")
    (row,) = rows(rollout(session.calls), mask_failed=("[exit ",))
    assert [message["train"] for message in row["messages"]] == [False, False, False, True]


def test_rewards_choose_rollouts() -> None:
    passed, failed = worked(1), replace(worked(1), verdict=Verdict(0.0))
    unscored = replace(worked(1), outcome=Outcome.CANCELLED)
    everything = (passed, failed, unscored)
    assert len(rows(*everything)) == 2
    assert len(rows(*everything, min_reward=1.0)) == 1
    assert len(rows(*everything, min_reward=None)) == 3


def test_sub_agents_have_rows_if_asked_for() -> None:
    made = worked(1)
    turns = tuple(replace(turn, role="subagent") for turn in made.trajectory.turns)
    made = replace(made, trajectory=replace(made.trajectory, turns=turns))
    assert not rows(made)
    assert len(rows(made, roles=("subagent",))) == 1


def test_datasets_loads_the_rows_as_they_are(tmp_path: Path) -> None:
    import datasets

    other = (
        Tool("read", "reads", '{"type": "object", "properties": {"path": {"type": "string"}}}'),
    )
    session = Recorder()
    session.say([TASK], asks(0), other)
    made = rows(worked(2), rollout(session.calls))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(loaded) == made
    texts = rows(worked(2), rollout(session.calls), tools_as_text=True)
    listed = datasets.Dataset.from_list(texts)
    assert [json.loads(row["tools"]) for row in listed] == [row["tools"] for row in made]
    assert [contents(row) for row in listed] == [contents(row) for row in made]
