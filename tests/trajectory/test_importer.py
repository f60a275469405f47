"""Sessions of others become rollouts; what does not fit is named with its file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katcore.errors import StageError
from katcore.schema.rollout import Rollout, Trajectory
from katcore.trajectory.atif import AtifConfig, AtifFormatter
from katcore.trajectory.chat import ChatConfig, ChatFormatter
from katcore.trajectory.importer import (
    IMPORTERS,
    read_atif,
    read_claude_code,
    read_opencode,
    read_verifiers,
)
from tests.trajectory.made import Recorder, rollout, sessions


def told(trajectory: Trajectory, number: int) -> list[tuple[str, str]]:
    prompt = trajectory.prompt(number)
    return [(message.role, message.content) for message in prompt]


def written(folder: Path, value: Any, name: str = "one.json") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = value if isinstance(value, list) else [value]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def checked(made: Rollout) -> Rollout:
    """No ids, no reward, and whole rows for whoever trains on text."""
    assert made.reward is None
    assert all(turn.origin == "api" and not turn.ids for turn in made.trajectory.turns)
    assert list(ChatFormatter(ChatConfig(min_reward=None)).samples([made]))
    return made


# ATIF


def step(number: int, source: str, message: str, **more: Any) -> dict[str, Any]:
    return {"step_id": number, "source": source, "message": message, **more}


def atif(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    agent = {"name": "terminus", "version": "2.0", "model_name": "a-model"}
    return {
        "schema_version": "ATIF-v1.6",
        "session_id": "s1",
        "agent": agent,
        "steps": list(steps),
    } | more


CALLED = {
    "tool_calls": [{"tool_call_id": "c1", "function_name": "bash", "arguments": {"command": "ls"}}],
    "observation": {"results": [{"source_call_id": "c1", "content": "a.py"}]},
}


def test_a_document_of_another_agent_is_read(tmp_path: Path) -> None:
    document = atif(
        step(1, "system", "You act."),
        step(2, "user", "fix it"),
        step(3, "agent", "look", reasoning_content="hm", model_name="other", **CALLED),
        step(4, "agent", "copied", is_copied_context=True),
        step(5, "agent", "done", timestamp="2026-01-02T00:00:00Z"),
    )
    made = checked(read_atif(written(tmp_path, document)))
    first, last = made.trajectory.turns
    assert (made.id, made.scaffold) == ("s1", "terminus 2.0")
    assert (first.text, first.reasoning, first.policy_version) == ("look", "hm", "other")
    assert first.tool_calls[0].arguments == '{"command":"ls"}'
    assert last.started_s == 1767312000
    assert told(made.trajectory, 1) == [
        ("system", "You act."),
        ("user", "fix it"),
        ("assistant", "look"),
        ("tool", "a.py"),
        ("assistant", "copied"),
    ]


def test_sub_agents_stand_where_they_came_back(tmp_path: Path) -> None:
    refer = {"subagent_trajectory_ref": [{"trajectory_id": "sub"}]}
    observed = {"observation": {"results": [{"source_call_id": "c1", "content": "fine", **refer}]}}
    inner = atif(step(1, "user", "look"), step(2, "agent", "it is fine"), trajectory_id="sub")
    lost = atif(step(1, "agent", "lost"), trajectory_id="lost")
    document = atif(
        step(1, "user", "fix it"),
        step(2, "agent", "", **{**CALLED, **observed}),
        step(3, "agent", "done"),
        subagent_trajectories=[inner, lost],
    )
    made = checked(read_atif(written(tmp_path, document)))
    assert [(turn.role, turn.text) for turn in made.trajectory.turns] == [
        ("main", ""),
        ("subagent", "it is fine"),
        ("main", "done"),
        ("subagent", "lost"),
    ]
    assert told(made.trajectory, 2)[-1] == ("tool", "fine")


@given(sessions())
def test_our_own_documents_give_back_what_the_agent_said(session: Recorder) -> None:
    made = rollout(session.calls, scaffold="claude-code 2.1", exit_reason="submitted")
    for document in AtifFormatter(AtifConfig()).samples([made]):
        with TemporaryDirectory() as folder:
            back = read_atif(written(Path(folder), document))
        assert (back.id, back.task_id, back.outcome) == (made.id, made.task_id, made.outcome)
        assert (back.reward, back.exit_reason, back.scaffold) == (
            1.0,
            "submitted",
            "claude-code 2.1",
        )
        kept = [turn for turn in made.trajectory.turns if turn.role in ("main", "post-compaction")]
        main = [turn for turn in back.trajectory.turns if turn.role != "subagent"]
        assert [(turn.text, turn.role) for turn in main] == [
            (turn.text, turn.role) for turn in kept
        ]


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ([], "expected a JSON object, found list"),
        ({}, "expected 'schema_version' (str), found nothing"),
        (
            atif() | {"schema_version": "2"},
            "schema_version is '2'; ATIF-v1.0 to ATIF-v1.8 can be read",
        ),
        (atif(step(1, "robot", "")), "document: step 1: source is 'robot'"),
        (
            atif(step(1, "user", ""), {"step_id": 2}),
            "step 2: expected 'source' (str), found nothing",
        ),
        (atif(step(1, "agent", "", tool_calls=[{}])), "step 1: expected 'tool_call_id' (str)"),
        (atif(extra={"katcore": {}}), "extra.katcore does not fit: KeyError('rollout_id')"),
    ],
)
def test_what_is_no_document_is_said(tmp_path: Path, document: Any, wanted: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(document))
    with pytest.raises(StageError) as error:
        read_atif(path)
    assert str(error.value).startswith(str(path))
    assert wanted in str(error.value)


# Claude Code


class Log:
    """Writes a session as Claude Code does: one line per block, each naming the one before."""

    def __init__(self, **more: Any) -> None:
        self.lines: list[dict[str, Any]] = [{"type": "file-history-snapshot", "messageId": "x"}]
        self.last: str | None = None
        self.more = {"sessionId": "s1", "version": "2.1.9", "isSidechain": False} | more

    def line(self, kind: str, message: dict[str, Any] | None = None, **more: Any) -> str:
        number = len(self.lines)
        entry = {
            "type": kind,
            "uuid": f"{self.more.get('agentId', 'u')}{number}",
            "parentUuid": self.last,
            "timestamp": f"2026-01-02T00:00:{number:02}.000Z",
            **self.more,
            **({"message": message} if message else {}),
            **more,
        }
        self.lines.append(entry)
        self.last = str(entry["uuid"])
        return self.last

    def user(self, content: Any, **more: Any) -> str:
        return self.line("user", {"role": "user", "content": content}, **more)

    def result(self, name: str, text: Any, **more: Any) -> str:
        return self.user([{"type": "tool_result", "tool_use_id": name, "content": text}], **more)

    def block(self, answer: str, **block: Any) -> str:
        message = {"id": answer, "role": "assistant", "model": "claude-x", "content": [block]}
        return self.line("assistant", message)

    def text(self, answer: str, text: str) -> str:
        return self.block(answer, type="text", text=text)

    def call(self, answer: str, name: str, **given: Any) -> str:
        return self.block(answer, type="tool_use", id=name, name="Bash", input=given)


def test_blocks_of_one_answer_are_one_turn_though_results_stand_between(tmp_path: Path) -> None:
    log = Log()
    log.user("fix it")
    log.user([{"type": "text", "text": "it is noon"}], isMeta=True)
    log.block("m1", type="thinking", thinking="hm")
    log.text("m1", "look")
    first = log.call("m1", "c1", command="ls")
    log.result("c1", "a.py", parentUuid=first)
    log.last = first
    log.call("m1", "c2", command="cat a.py")
    image = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
    }
    log.result("c2", [{"type": "text", "text": "x = 1"}, image])
    log.line("system", subtype="turn_duration")
    log.text("m2", "done")
    made = checked(read_claude_code(written(tmp_path, log.lines, "s1.jsonl")))
    turn, last = made.trajectory.turns
    assert (made.id, made.scaffold) == ("s1", "claude-code 2.1.9")
    assert (turn.text, turn.reasoning, turn.policy_version) == ("look", "hm", "claude-x")
    assert [call.id for call in turn.tool_calls] == ["c1", "c2"]
    assert last.messages[1].images == ("data:image/png;base64,AA==",)
    assert told(made.trajectory, 1) == [
        ("user", "fix it"),
        ("user", "it is noon"),
        ("assistant", "look"),
        ("tool", "a.py"),
        ("tool", "x = 1"),
    ]


def test_a_session_forks_where_its_user_went_back(tmp_path: Path) -> None:
    log = Log()
    log.user("one")
    first = log.text("m1", "said one")
    log.user("two")
    log.text("m2", "said two")
    log.last = first
    log.user("three")
    log.text("m3", "said three")
    log.last = None
    log.user("four")
    log.text("m4", "said four")
    made = checked(read_claude_code(written(tmp_path, log.lines, "s1.jsonl")))
    assert [turn.parent for turn in made.trajectory.turns] == [-1, 0, 0, -1]
    assert told(made.trajectory, 2) == [
        ("user", "one"),
        ("assistant", "said one"),
        ("user", "three"),
    ]
    assert told(made.trajectory, 3) == [("user", "four")]


def test_after_a_compaction_a_conversation_begins_anew(tmp_path: Path) -> None:
    log = Log()
    log.user("fix it")
    before = log.text("m1", "I did")
    log.line("system", subtype="compact_boundary", parentUuid=None, logicalParentUuid=before)
    log.user("So far: it was fixed.", isCompactSummary=True)
    log.text("m2", "done")
    made = checked(read_claude_code(written(tmp_path, log.lines, "s1.jsonl")))
    assert [turn.role for turn in made.trajectory.turns] == ["main", "post-compaction"]
    assert told(made.trajectory, 1) == [("user", "So far: it was fixed.")]


@pytest.mark.parametrize("is_beside", [True, False])
def test_sub_agents_are_read_from_either_place(tmp_path: Path, is_beside: bool) -> None:  # noqa: FBT001
    log = Log()
    log.user("fix it")
    log.call("m1", "c1", prompt="look")
    side = Log(isSidechain=True, agentId="a1")
    side.user("look")
    side.text("m9", "it is fine")
    log.result("c1", "it is fine")
    log.text("m2", "done")
    if is_beside:
        written(tmp_path, side.lines, "s1/subagents/agent-a1.jsonl")
    else:
        log.lines[3:3] = side.lines[1:]
    made = checked(read_claude_code(written(tmp_path, log.lines, "s1.jsonl")))
    found = sorted((turn.role, turn.text) for turn in made.trajectory.turns)
    assert found == [("main", ""), ("main", "done"), ("subagent", "it is fine")]
    main = [at for at, turn in enumerate(made.trajectory.turns) if turn.role == "main"]
    assert told(made.trajectory, main[1])[-1] == ("tool", "it is fine")


def test_answers_that_the_agent_made_up_and_repeated_lines_are_left_out(tmp_path: Path) -> None:
    log = Log()
    log.user("fix it")
    log.line(
        "assistant",
        {"id": "e", "model": "<synthetic>", "content": [{"type": "text", "text": "API Error"}]},
    )
    log.text("m1", "done")
    log.lines += log.lines[1:]
    made = checked(read_claude_code(written(tmp_path, log.lines, "s1.jsonl")))
    assert [turn.text for turn in made.trajectory.turns] == ["done"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected a JSON object, found list"),
        ('{"type": "user"}', "line 2: expected 'message' (dict), found nothing"),
        ('{"type": "user", "message": {"content": 3}}', "line 2: the message's content is neither"),
        (
            '{"type": "user", "message": {"content": [{"type": "tool_result"}]}}',
            "line 2: expected 'tool_use_id' (str), found nothing",
        ),
        ('{"type": "summary"}', "no line holds an answer of the assistant"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, line: str, wanted: str) -> None:
    path = tmp_path / "s1.jsonl"
    path.write_text(f'{{"type": "mode"}}\n{line}\n')
    with pytest.raises(StageError) as error:
        read_claude_code(path)
    assert str(error.value).startswith(str(path))
    assert wanted in str(error.value)


# OpenCode


def message(role: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    facts = {"id": "m", "role": role, "time": {"created": 1767312000000}}
    if role == "assistant":
        facts |= {"providerID": "a", "modelID": "b"}
    return {"info": facts | more, "parts": list(parts)}


def text(said: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **more}


def tool(name: str, **state: Any) -> dict[str, Any]:
    return {
        "type": "tool",
        "callID": name,
        "tool": "bash",
        "state": {"input": {"command": "ls"}} | state,
    }


START, FINISH = {"type": "step-start"}, {"type": "step-finish", "reason": "stop"}


def export(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"info": {"id": "ses_1", "version": "1.4.0"}, "messages": list(messages)}


def test_steps_of_an_export_are_turns(tmp_path: Path) -> None:
    picture = {"type": "file", "mime": "image/png", "url": "data:image/png;base64,AA=="}
    value = export(
        message("user", text("fix it"), text("hidden", ignored=True), picture),
        message(
            "assistant",
            START,
            {"type": "reasoning", "text": "hm"},
            text("look"),
            tool("c1", status="completed", output="a.py"),
            tool("c2", status="error", error="no such file"),
            FINISH,
            START,
            text("again"),
            tool("c3", status="running"),
        ),
        message("user", text("go on")),
        message("assistant", START, text("done"), FINISH),
    )
    made = checked(read_opencode(written(tmp_path, value)))
    first, second, _ = made.trajectory.turns
    assert (made.id, made.scaffold) == ("ses_1", "opencode 1.4.0")
    assert (first.reasoning, first.policy_version, first.started_s) == ("hm", "a/b", 1767312000)
    assert first.messages[0].images == ("data:image/png;base64,AA==",)
    assert [call.id for call in (*first.tool_calls, *second.tool_calls)] == ["c1", "c2", "c3"]
    assert told(made.trajectory, 2) == [
        ("user", "fix it"),
        ("assistant", "look"),
        ("tool", "a.py"),
        ("tool", "no such file"),
        ("assistant", "again"),
        ("user", "go on"),
    ]


def test_a_summary_begins_a_conversation(tmp_path: Path) -> None:
    value = export(
        message("user", text("fix it")),
        message("assistant", START, text("look")),
        message("user", {"type": "compaction", "auto": True}),
        message("assistant", START, text("It was fixed."), summary=True),
        message("user", text("go on")),
        message("assistant", START, text("done")),
    )
    made = checked(read_opencode(written(tmp_path, value)))
    assert [turn.role for turn in made.trajectory.turns] == ["main", "auxiliary", "post-compaction"]
    assert told(made.trajectory, 2) == [
        ("user", "What did we do so far?"),
        ("assistant", "It was fixed."),
        ("user", "go on"),
    ]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"messages": []}, "expected 'info' (dict), found nothing"),
        (export(), "no message holds an answer"),
        (export({"type": "user"}), "messages[0]: expected 'info' (dict), found nothing"),
        (export(message("robot")), "messages[0]: role is 'robot'"),
        (export(message("assistant", {"type": "tool"})), "messages[0]: expected 'callID' (str)"),
    ],
)
def test_what_is_no_export_is_said(tmp_path: Path, value: Any, wanted: str) -> None:
    path = written(tmp_path, value)
    with pytest.raises(StageError) as error:
        read_opencode(path)
    assert str(error.value).startswith(str(path))
    assert wanted in str(error.value)


@pytest.mark.parametrize("read", [read_atif, read_claude_code, read_opencode])
def test_a_file_that_is_not_there_is_said(tmp_path: Path, read: Callable[[Path], Rollout]) -> None:
    with pytest.raises(StageError, match=r"none\.jsonl: cannot be read: No such file"):
        read(tmp_path / "none.jsonl")


# verifiers


def trace(*nodes: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "id": "t1",
        "task": {"type": "Sums", "data": {}, "key": "sums/3"},
        "agent": {"name": "solver"},
        "tools": [{"name": "bash", "description": "runs", "parameters": {"type": "object"}}],
        "nodes": list(nodes),
        "calls": [{"node": 2, "model": "a-model", "time": {"start": 7.0, "end": 8.0}}],
        "rewards": {"right": {"score": 1.0, "weight": 0.5}, "short": {"score": 0.5}},
        "metrics": {"turns": 2, "unknown": None},
    } | more


def node(parent: int | None, role: str, content: str | None, **more: Any) -> dict[str, Any]:
    is_answer = role == "assistant"
    said = {"role": role, "content": content} | more
    return {"parent": parent, "sampled": is_answer, "message": said, "token_ids": [1]}


ASKED = {"tool_calls": [{"id": "c1", "name": "bash", "arguments": "{}"}], "reasoning_content": "hm"}
TRACE = trace(
    node(None, "system", "be brief"),
    node(0, "user", "2 + 2"),
    node(1, "assistant", None, **ASKED),
    node(None, "user", "look around"),
    node(3, "assistant", "a folder"),
    node(2, "tool", "4", tool_call_id="c1"),
    node(5, "assistant", "4"),
    node(2, "tool", "5", tool_call_id="c1"),
    node(7, "assistant", "5"),
)


def test_a_trace_of_verifiers_is_a_tree_of_turns(tmp_path: Path) -> None:
    made, other = read_verifiers(written(tmp_path, [TRACE, TRACE | {"id": "t2"}], "traces.jsonl"))
    assert (made.id, other.id, made.task_id, made.scaffold) == ("t1", "t2", "sums/3", "solver")
    turns = made.trajectory.turns
    assert [turn.parent for turn in turns] == [-1, -1, 0, 0]
    assert [turn.role for turn in turns] == ["main", "subagent", "main", "main"]
    first = [("system", "be brief"), ("user", "2 + 2")]
    assert told(made.trajectory, 0) == first
    assert told(made.trajectory, 3) == [*first, ("assistant", ""), ("tool", "5")]
    assert (turns[0].reasoning, turns[0].tool_calls[0].name) == ("hm", "bash")
    assert (turns[0].policy_version, turns[0].started_s) == ("a-model", 7.0)
    assert [tool.name for tool in turns[0].tools or ()] == ["bash"]
    assert made.reward == 1.0
    assert made.verdict.metrics == {"turns": 2.0}
    rows = list(ChatFormatter(ChatConfig()).samples([made]))
    assert [row["messages"][-1]["content"] for row in rows] == ["4", "5"]


@pytest.mark.parametrize(
    ("more", "reward", "said"),
    [
        ({"rewards": {"right": None}}, None, "without a verdict"),
        ({"rewards": {}}, None, "without a verdict"),
        ({"rewards": {"right": {"score": 3.0}}}, None, "3 is not between 0 and 1"),
        ({"errors": [{"type": "E", "message": "early"}], "ok": True}, 1.0, "imported"),
    ],
)
def test_a_trace_has_a_reward_only_if_it_was_judged(
    tmp_path: Path, more: dict[str, Any], reward: float | None, said: str
) -> None:
    (made,) = read_verifiers(written(tmp_path, TRACE | more))
    assert made.reward == reward
    assert said in made.verdict.reason


def test_a_trace_that_failed_is_no_reward_of_zero(tmp_path: Path) -> None:
    errors = [{"type": "SandboxError", "message": "gone"}]
    (made,) = read_verifiers(written(tmp_path, TRACE | {"errors": errors, "ok": False}))
    assert (made.outcome, made.reward) == ("scaffold-failed", None)
    assert made.error == "SandboxError: gone"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"version": 2}, "line 1: expected a trace of version 1, found 2"),
        (trace(node(4, "user", "x")), "node 0: its parent is 4"),
        (trace(node(None, "judge", "x"), node(0, "assistant", "y")), "node 0: role is 'judge'"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, value: dict[str, Any], said: str) -> None:
    with pytest.raises(StageError, match=said):
        list(read_verifiers(written(tmp_path, value)))


WHOLE: dict[str, list[dict[str, Any]]] = {
    "verifiers": [TRACE],
    "atif": [
        atif(
            step(1, "user", "x"),
            step(2, "agent", "", extra={"katcore": {"role": "main"}}, **CALLED),
        )
    ],
    "opencode": [
        export(
            message("user", text("x")),
            message("assistant", START, text("y"), tool("c", status="completed", output="z")),
        )
    ],
    "claude-code": [
        {"type": "user", "uuid": "1", "message": {"content": [{"type": "text", "text": "x"}]}},
        {
            "type": "assistant",
            "uuid": "2",
            "parentUuid": "1",
            "timestamp": "2026-01-02",
            "message": {
                "id": "m",
                "model": "c",
                "content": [{"type": "tool_use", "id": "c", "name": "n", "input": {}}],
            },
        },
        {
            "type": "user",
            "uuid": "3",
            "parentUuid": "2",
            "message": {"content": [{"type": "tool_result", "tool_use_id": "c", "content": "z"}]},
        },
        {"type": "user", "uuid": "4", "parentUuid": "1", "message": {"content": "again"}},
    ],
}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value, as its container and the key there."""
    keys = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [place for _, item in keys if isinstance(item, dict | list) for place in places(item)]
    return [
        *((value, key) for key in (value if isinstance(value, dict) else range(len(value)))),
        *inner,
    ]


@pytest.mark.parametrize("kind", IMPORTERS)
@given(data=st.data())
def test_whatever_stands_in_a_file_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    value = json.loads(json.dumps(WHOLE[kind]))
    container, key = data.draw(st.sampled_from(places(value)))
    container[key] = data.draw(
        st.sampled_from([None, 1, "", "x", [], {}, [1], [{}], {"type": "x"}])
    )
    with TemporaryDirectory() as folder:
        path = written(Path(folder), value)
        refusal = ""
        try:
            list(IMPORTERS[kind](path))
        except StageError as error:
            refusal = str(error)
        assert not refusal or str(path) in refusal
