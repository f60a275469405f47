"""ATIF documents hold to the format by Harbor's own models, say everything once, and name sub-agents where
they came back.
"""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from harbor.models.trajectories import Trajectory
from hypothesis import given

from katcore.schema.call import Message, ToolCall
from katcore.schema.rollout import Outcome, Rollout
from katcore.trajectory.atif import AtifConfig, AtifFormatter
from tests.trajectory.made import TOOLS, Recorder, rollout, sessions

LATEST = Trajectory.model_fields["schema_version"].default


def documents(*made: Rollout, **options: Any) -> list[dict[str, Any]]:
    found = list(AtifFormatter(AtifConfig(**options)).samples(made))
    for document in found:
        checked = Trajectory.model_validate_json(json.dumps(document))
        assert checked.schema_version == LATEST
    return found


SYSTEM = Message("system", "You are an agent.")
TASK = Message("user", "fix it")


def asks(name: str, **arguments: str) -> Message:
    call = ToolCall(f"id-{name}", name, json.dumps(arguments))
    return Message("assistant", "", tool_calls=(call,))


def test_a_rollout_is_a_document() -> None:
    session = Recorder()
    history = [SYSTEM, TASK]
    history += [session.say(history, asks("bash", command="ls"), TOOLS)]
    history += [Message("tool", "a.py", tool_call_id="id-bash")]
    session.say(history, "done", TOOLS)
    made = rollout(session.calls, scaffold="claude-code 2.1.330")
    (document,) = documents(made)
    assert document["agent"] == {
        "name": "claude-code",
        "version": "2.1.330",
        "model_name": "3",
        "tool_definitions": [
            {
                "type": "function",
                "function": {"name": "bash", "description": "runs a command", "parameters": {}},
            }
        ],
    }
    assert [step["source"] for step in document["steps"]] == ["system", "user", "agent", "agent"]
    acted, ended = document["steps"][2:]
    assert acted["tool_calls"] == [
        {"tool_call_id": "id-bash", "function_name": "bash", "arguments": {"command": "ls"}}
    ]
    assert acted["observation"] == {"results": [{"source_call_id": "id-bash", "content": "a.py"}]}
    assert ended["message"] == "done"
    metrics = ended["metrics"]
    assert tuple(metrics["prompt_token_ids"]) == session.prompts[1]
    assert tuple(metrics["completion_token_ids"]) == session.calls[1].generation.ids
    assert tuple(metrics["logprobs"]) == session.calls[1].generation.logprobs
    assert document["final_metrics"] == {
        "total_steps": 4,
        "total_prompt_tokens": sum(map(len, session.prompts)),
        "total_completion_tokens": sum(len(one.generation.ids) for one in session.calls),
    }
    assert document["extra"]["katcore"]["reward"] == 1.0
    (short,) = documents(made, prompt_ids=False)
    assert "prompt_token_ids" not in short["steps"][3]["metrics"]
    (short,) = documents(made, token_ids=False)
    assert set(short["steps"][3]["metrics"]) == {"prompt_tokens", "completion_tokens"}


@given(sessions())
def test_every_answer_of_the_agent_is_one_step_and_no_text_is_told_more_often_than_it_was_said(
    session: Recorder,
) -> None:
    made = rollout(session.calls)
    main = [at for at, turn in enumerate(made.trajectory.turns) if turn.role == "main"]
    main += [at for at, turn in enumerate(made.trajectory.turns) if turn.role == "post-compaction"]
    found = documents(made)
    assert bool(found) == bool(main)
    for document in found:
        steps = document["steps"]
        told = [step["extra"]["katcore"]["turn"] for step in steps if "extra" in step]
        assert told == sorted(main)
        users = Counter(step["message"] for step in steps if step["source"] == "user")
        most: Counter[str] = Counter()
        for at in main:
            prompt = made.trajectory.prompt(at)
            most |= Counter(said.content for said in prompt if said.role == "user")
        assert users == most


def test_two_sub_agents_are_named_where_they_came_back() -> None:
    session = Recorder()
    both = (
        *asks("Agent", prompt="look at one").tool_calls,
        ToolCall("id-second", "Agent", json.dumps({"prompt": "look at two"})),
    )
    history = [SYSTEM, TASK]
    history += [session.say(history, Message("assistant", "", tool_calls=both), TOOLS)]
    one = [SYSTEM, Message("user", "look at one")]
    two = [SYSTEM, Message("user", "look at two")]
    one += [session.say(one, asks("read", path="1"), TOOLS)]
    two += [session.say(two, asks("read", path="1"), TOOLS)]
    session.say([*one, Message("tool", "text", tool_call_id="id-read")], "one is fine", TOOLS)
    session.say([*two, Message("tool", "text", tool_call_id="id-read")], "two is fine", TOOLS)
    history += [Message("tool", "one is fine", tool_call_id="id-Agent")]
    history += [Message("tool", "two is fine", tool_call_id="id-second")]
    session.say(history, "done", TOOLS)
    (document,) = documents(rollout(session.calls))
    results = document["steps"][2]["observation"]["results"]
    refs = [result["subagent_trajectory_ref"][0]["trajectory_id"] for result in results]
    inner = {one["trajectory_id"]: one for one in document["subagent_trajectories"]}
    assert [inner[ref]["steps"][1]["message"] for ref in refs] == ["look at one", "look at two"]
    assert [inner[ref]["steps"][-1]["message"] for ref in refs] == ["one is fine", "two is fine"]
    assert [len(inner[ref]["steps"]) for ref in refs] == [4, 4]


def test_what_the_format_has_no_word_for_is_kept_aside() -> None:
    session = Recorder()
    strange = Message("assistant", "", tool_calls=(ToolCall("", "bash", "not json"),))
    image = "data:image/webp;base64,AA=="
    session.say([replace(TASK, images=(image, "https://x/y.jpg"))], strange, TOOLS)
    made = rollout(session.calls, outcome=Outcome.CANCELLED)
    turn = replace(made.trajectory.turns[0], reasoning="hm", origin="api", ids=(), logprobs=())
    made = replace(made, trajectory=replace(made.trajectory, turns=(turn,)))
    (document,) = documents(made)
    asked, acted = document["steps"]
    assert [part["source"]["media_type"] for part in asked["message"][1:] if "source" in part] == [
        "image/webp",
        "image/jpeg",
    ]
    (call,) = acted["tool_calls"]
    assert (call["tool_call_id"], call["arguments"]) == ("call-2-0", {})
    assert call["extra"] == {"katcore": {"arguments": "not json"}}
    assert acted["reasoning_content"] == "hm"
    assert "metrics" not in acted
    assert document["extra"]["katcore"]["outcome"] == "cancelled"
    assert document["extra"]["katcore"]["reward"] is None


def test_a_rollout_in_which_nothing_was_asked_has_no_document() -> None:
    assert not documents(rollout([]))
