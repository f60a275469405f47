"""OpenCode's session exports (`opencode export <session> > file.json`, version 1) as rollouts.

An export is `{"info": ..., "messages": [{"info": ..., "parts": [...]}]}`. A part of type `step-start` begins
an answer of the model; a part of type `tool` is a call and its result in one. After a compaction, what was
said before is replaced by the answer that is marked `summary`. System prompt and tools are not in these
files, and a sub-agent's session is an export of its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from katcore.errors import StageError
from katcore.schema.call import Message, ToolCall
from katcore.schema.rollout import Rollout
from katcore.trajectory.importer.draft import Draft, Thread, as_record, fitting, read_bytes, wanted

_ASKED = "What did we do so far?"
"""What OpenCode puts before a summary."""


def read_opencode(path: Path) -> Rollout:
    """The rollout of an exported session.

    Raises:
        StageError: the file is no export of version 1, or holds no answer; names the file and the message.
    """
    export = as_record(read_bytes(path), str(path))
    info = wanted(export, "info", dict, str(path))
    draft, thread = Draft(), Thread()
    for at, entry in enumerate(wanted(export, "messages", list, str(path))):
        where = f"{path}: messages[{at}]"
        with fitting(where):
            thread = _told(draft, thread, entry, where)
    if not draft.turns:
        raise StageError(f"{path}: no message holds an answer of the assistant")
    version = str(info.get("version") or "")
    return draft.rollout(wanted(info, "id", str, str(path)), scaffold=f"opencode {version}".strip())


def _told(draft: Draft, thread: Thread, entry: Any, where: str) -> Thread:
    """Read one message; returns the conversation that goes on after it."""
    said = wanted(entry, "info", dict, where)
    parts = wanted(entry, "parts", list, where)
    role = wanted(said, "role", str, where)
    if role == "assistant":
        return _answered(draft, thread, said, parts, where)
    if role != "user":
        raise StageError(f"{where}: role is {role!r}; it has to be user or assistant")
    thread.pending += _asked(parts, where)
    return thread


def _answered(
    draft: Draft, thread: Thread, said: dict[str, Any], parts: list[Any], where: str
) -> Thread:
    """Add the answers of a message; returns the conversation that goes on from them."""
    model = "/".join(str(said[name]) for name in ("providerID", "modelID") if said.get(name))
    at_s = float((said.get("time") or {}).get("created") or 0) / 1000
    is_summary = said.get("summary") is True
    role = thread.role
    before = len(draft.turns)
    for step in _steps(parts, where):
        message, results = _answer(step, where)
        thread.role = "auxiliary" if is_summary else role
        draft.answer(thread, message, model=model, at_s=at_s)
        thread.role = role
        thread.pending += results
    if not is_summary or len(draft.turns) == before:
        return thread
    summary = Message("assistant", draft.turns[-1].text)
    return Thread("post-compaction", pending=[Message("user", _ASKED), summary])


def _steps(parts: list[Any], where: str) -> Iterator[list[dict[str, Any]]]:
    """The parts of each answer, without those that hold nothing of it."""
    step: list[dict[str, Any]] = []
    for part in parts:
        kind = wanted(part, "type", str, where)
        if kind == "step-start" and step:
            yield step
            step = []
        elif kind in ("text", "reasoning", "tool"):
            step.append(part)
    if step:
        yield step


def _answer(step: list[dict[str, Any]], where: str) -> tuple[Message, list[Message]]:
    texts = [wanted(part, "text", str, where) for part in step if part["type"] == "text"]
    thoughts = [wanted(part, "text", str, where) for part in step if part["type"] == "reasoning"]
    calls: list[ToolCall] = []
    results: list[Message] = []
    for part in step:
        if part["type"] != "tool":
            continue
        name = wanted(part, "callID", str, where)
        state = wanted(part, "state", dict, where)
        arguments = orjson.dumps(wanted(state, "input", dict, where)).decode()
        calls.append(ToolCall(name, wanted(part, "tool", str, where), arguments))
        field = {"completed": "output", "error": "error"}.get(str(state.get("status")))
        if field:
            images = _images(state.get("attachments") or ())
            text = wanted(state, field, str, where)
            results.append(Message("tool", text, tool_call_id=name, images=images))
    message = Message("assistant", "\n".join(texts), "\n".join(thoughts), tuple(calls))
    return message, results


def _asked(parts: list[Any], where: str) -> list[Message]:
    """What a user's message sent; empty for one that only asked for a compaction."""
    texts = [
        wanted(part, "text", str, where)
        for part in parts
        if wanted(part, "type", str, where) == "text" and not part.get("ignored")
    ]
    images = _images(parts)
    return [Message("user", "\n".join(texts), images=images)] if texts or images else []


def _images(parts: Any) -> tuple[str, ...]:
    return tuple(
        str(part["url"])
        for part in parts
        if part.get("type") == "file" and str(part.get("mime", "")).startswith("image/")
    )
