"""Traces of verifiers (version 1, one per line of `traces.jsonl`) as rollouts.

A trace is a graph of messages; each that a model gave is a turn. Ids and log-probabilities are left out:
nothing proves what they were sampled from.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import orjson

from katcore.errors import StageError
from katcore.schema.call import Message, Role, Tool, ToolCall
from katcore.schema.rollout import Outcome, Rollout, TurnRole, Verdict
from katcore.trajectory.importer.draft import NO_VERDICT, Draft, Thread, as_record, fitting, wanted

_VERSION = 1


def read_verifiers(path: Path) -> Iterator[Rollout]:
    """The rollouts of a file, one at a time.

    Raises:
        StageError: a line is no trace; names the line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _rollout(line, f"{path}, line {number}")
    except OSError as error:
        raise StageError(f"{path}: cannot be read: {error.strerror}") from error


def _rollout(line: bytes, where: str) -> Rollout:
    trace = as_record(line, where)
    if trace.get("version") != _VERSION:
        raise StageError(
            f"{where}: expected a trace of version {_VERSION}, found {trace.get('version')!r}"
        )
    with fitting(where):
        draft = Draft()
        _tell(draft, trace, where)
        task = wanted(trace, "task", dict, where)
        name = str(task.get("key") or task.get("hash") or trace["id"])
        agent = trace.get("agent") or {}
        return draft.rollout(
            wanted(trace, "id", str, where),
            task_id=name,
            group=name,
            scaffold=str(agent.get("name") or ""),
            **_judged(trace),
        )


def _judged(trace: dict[str, Any]) -> dict[str, Any]:
    """The verdict: the sum of the weighed rewards, as verifiers has it.

    None if one was not given, or if it is no reward of ours, which are between 0 and 1.
    """
    errors = trace.get("errors") or []
    if errors and not trace.get("ok"):
        said = "; ".join(f"{one['type']}: {one['message']}" for one in errors)
        return {"outcome": Outcome.SCAFFOLD_FAILED, "verdict": Verdict(None), "error": said}
    rewards = list((trace.get("rewards") or {}).values())
    given = (trace.get("metrics") or {}).items()
    metrics = {name: float(value) for name, value in given if value is not None}
    if not rewards or None in rewards:
        return {"verdict": replace(NO_VERDICT, metrics=metrics)}
    total = float(sum(one["score"] * one.get("weight", 1.0) for one in rewards))
    if not 0 <= total <= 1:
        reason = f"imported; its reward of {total:g} is not between 0 and 1"
        return {"verdict": Verdict(None, reason, metrics | {"reward": total})}
    return {"verdict": Verdict(total, "imported", metrics)}


def _tell(draft: Draft, trace: dict[str, Any], where: str) -> None:
    nodes = wanted(trace, "nodes", list, where)
    roots, depths = _places(nodes, where)
    roles = _roles(nodes, roots)
    models = {
        call["node"]: call for call in trace.get("calls") or () if call.get("node") is not None
    }
    tools = tuple(_tool(one, where) for one in trace.get("tools") or ())
    turns: dict[int, int] = {}
    for at, node in enumerate(nodes):
        if not node.get("sampled"):
            continue
        pending: list[Message] = []
        before = node.get("parent")
        while before is not None and before not in turns:
            pending.insert(0, _message(nodes[before], f"{where}: node {before}"))
            before = nodes[before].get("parent")
        thread = Thread(roles[roots[at]], pending=pending)
        if before is not None:
            thread.last, thread.num_messages = turns[before], depths[before] + 1
        call = models.get(at) or {}
        draft.answer(
            thread,
            _message(node, f"{where}: node {at}"),
            model=str(call.get("model") or ""),
            at_s=float((call.get("time") or {}).get("start") or 0.0),
            tools=tools if before is None else None,
        )
        turns[at] = thread.last


def _places(nodes: list[Any], where: str) -> tuple[list[int], list[int]]:
    """For each node the root of its conversation, and how many messages are before it."""
    roots: list[int] = []
    depths: list[int] = []
    for at, node in enumerate(nodes):
        parent = node.get("parent")
        if parent is not None and not 0 <= parent < at:
            raise StageError(f"{where}: node {at}: its parent is {parent}, which is not before it")
        roots.append(at if parent is None else roots[parent])
        depths.append(0 if parent is None else depths[parent] + 1)
    return roots, depths


def _roles(nodes: list[Any], roots: list[int]) -> dict[int, TurnRole]:
    """Of each conversation: one that lies within another is a sub-agent's, a later one goes on after it."""
    spans: dict[int, tuple[int, int]] = {}
    for at, node in enumerate(nodes):
        if node.get("sampled"):
            first, _ = spans.get(roots[at], (at, at))
            spans[roots[at]] = (first, at)
    roles: dict[int, TurnRole] = {}
    for root, (first, last) in spans.items():
        is_inside = any(begin < first and last < end for begin, end in spans.values())
        roles[root] = "subagent" if is_inside else "post-compaction" if roles else "main"
    return roles


def _message(node: dict[str, Any], where: str) -> Message:
    said = wanted(node, "message", dict, where)
    role: Any = said.get("role")
    if role not in get_args(Role):
        raise StageError(
            f"{where}: role is {role!r}; it has to be one of {', '.join(get_args(Role))}"
        )
    text, images = _content(said.get("content"))
    calls = tuple(
        ToolCall(call["id"], call["name"], call["arguments"])
        for call in said.get("tool_calls") or ()
    )
    return Message(
        role,
        text,
        said.get("reasoning_content") or "",
        calls,
        said.get("tool_call_id") or "",
        images,
    )


def _content(content: Any) -> tuple[str, tuple[str, ...]]:
    if content is None or isinstance(content, str):
        return content or "", ()
    texts = [part["text"] for part in content if part["type"] == "text"]
    images = tuple(part["image_url"]["url"] for part in content if part["type"] == "image_url")
    return "\n".join(texts), images


def _tool(given: dict[str, Any], where: str) -> Tool:
    schema = orjson.dumps(given.get("parameters") or {}).decode()
    return Tool(
        wanted(given, "name", str, f"{where}: tools"), given.get("description") or "", schema
    )
