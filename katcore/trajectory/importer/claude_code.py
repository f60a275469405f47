"""Claude Code's session files (`~/.claude/projects/*/<session>.jsonl`) as rollouts.

Each line is an event; those of type `user` and `assistant` hold a message in Anthropic's form. One answer of
the model is spread over several lines, a content block each, under one message id; results of its first tool
calls may stand between them. Lines of a sub-agent are marked `isSidechain`, in the same file or, in newer
versions, in `<session>/subagents/*.jsonl`. Where a user went back to an earlier message, the next line's
`parentUuid` leads there. System prompt and tools are not in these files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import merge
from pathlib import Path
from typing import Any

import orjson

from katcore.errors import StageError
from katcore.schema.call import Message, ToolCall
from katcore.schema.rollout import Rollout, TurnRole
from katcore.trajectory.conversation import num_messages
from katcore.trajectory.importer.draft import (
    Draft,
    Thread,
    as_record,
    fitting,
    read_bytes,
    seconds,
    wanted,
)

_SYNTHETIC = "<synthetic>"
"""The model of answers that the agent wrote itself, as when a request failed."""


def read_claude_code(path: Path) -> Rollout:
    """The rollout of a session, its sub-agents' files beside it included.

    Raises:
        StageError: a line does not fit, or no line holds an answer; names the file and the line.
    """
    files = [path, *sorted((path.with_suffix("") / "subagents").glob("*.jsonl"))]
    events = list(
        merge(*map(_events, files), key=lambda event: str(event.record.get("timestamp", "")))
    )
    draft = Draft()
    session = _Session(draft, events)
    for event in events:
        with fitting(event.where):
            session.take(event)
    session.close()
    if not draft.turns:
        raise StageError(f"{path}: no line holds an answer of the assistant")
    name = _first(events, "sessionId") or path.stem
    return draft.rollout(name, scaffold=f"claude-code {_first(events, 'version')}".strip())


@dataclass(frozen=True, slots=True)
class _Event:
    record: dict[str, Any]
    where: str

    @property
    def uuid(self) -> str:
        return str(self.record.get("uuid") or "")

    @property
    def parent(self) -> str:
        return str(self.record.get("parentUuid") or "")

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = wanted(self.record, "message", dict, self.where)
        return message

    @property
    def is_said(self) -> bool:
        """Whether the model was sent it, or gave it."""
        return self.record.get("type") in ("user", "assistant") and not self.is_made_up

    @property
    def is_made_up(self) -> bool:
        """Whether it is an answer that the agent wrote itself."""
        return self.record["type"] == "assistant" and self.message.get("model") == _SYNTHETIC

    @property
    def answer_id(self) -> str:
        return str(self.message.get("id") or self.uuid)


@dataclass(slots=True)
class _Talk:
    """A conversation, and the answer in it that may not be over yet."""

    thread: Thread
    answer_id: str = ""
    is_open: bool = False
    model: str = ""
    at_s: float = 0.0
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    later: list[Message] = field(default_factory=list)


class _Session:
    """Reads events in order; each sub-agent has a conversation of its own."""

    def __init__(self, draft: Draft, events: Iterable[_Event]) -> None:
        self._draft = draft
        self._events = {event.uuid: event for event in events if event.uuid}
        self._talks: dict[str, _Talk] = {}
        self._turns: dict[str, int] = {}
        self._seen: set[str] = set()
        sides = [bool(item.record.get("isSidechain")) for item in events if item.is_said]
        self._has_main = not all(sides)

    def take(self, event: _Event) -> None:
        """Read one event."""
        if not event.is_said or event.uuid in self._seen:
            return
        self._seen.add(event.uuid)
        name = self._name(event)
        role: TurnRole = "subagent" if name and self._has_main else "main"
        talk = self._talks.setdefault(name, _Talk(Thread(role)))
        if event.record["type"] == "assistant":
            self._answer(talk, event)
            return
        messages = _asked(event)
        if any(message.role == "user" for message in messages):
            self._go_back(talk, event)
        (talk.later if talk.is_open else talk.thread.pending).extend(messages)

    def close(self) -> None:
        """End the last answers."""
        for talk in self._talks.values():
            self._end(talk)

    def _name(self, event: _Event) -> str:
        """Which conversation an event is of: "" for the agent's own."""
        if not event.record.get("isSidechain"):
            return ""
        *_, root = self._line(event)
        return str(event.record.get("agentId") or root.uuid)

    def _line(self, event: _Event) -> Iterator[_Event]:
        """An event, and all that it follows, the latest first."""
        met: set[str] = set()
        node: _Event | None = event
        while node is not None and node.uuid not in met:
            met.add(node.uuid)
            yield node
            node = self._events.get(node.parent)

    def _answer(self, talk: _Talk, event: _Event) -> None:
        name, message = event.answer_id, event.message
        if name in self._turns:
            return
        if not talk.is_open or talk.answer_id != name:
            self._end(talk)
            talk.answer_id, talk.is_open = name, True
            talk.model = str(message.get("model") or "")
            talk.at_s = seconds(event.record.get("timestamp"))
        for block in _blocks(message, event.where):
            kind = block.get("type")
            if kind == "text":
                talk.texts.append(wanted(block, "text", str, event.where))
            elif kind == "thinking":
                talk.thoughts.append(wanted(block, "thinking", str, event.where))
            elif kind == "tool_use":
                talk.calls.append(_call(block, event.where))

    def _end(self, talk: _Talk) -> None:
        if not talk.is_open:
            return
        text, thought = "\n".join(talk.texts), "\n".join(talk.thoughts)
        message = Message("assistant", text, thought, tuple(talk.calls))
        self._draft.answer(talk.thread, message, model=talk.model, at_s=talk.at_s)
        self._turns[talk.answer_id] = talk.thread.last
        talk.thread.pending, talk.is_open = talk.later, False
        talk.texts, talk.thoughts, talk.calls, talk.later = [], [], [], []

    def _go_back(self, talk: _Talk, event: _Event) -> None:
        """Where a user's message follows another answer than the last, go on from that one."""
        between: list[_Event] = []
        anchor = is_compacted = None
        for node in self._line(event):
            if node.record.get("type") == "assistant" and node.is_said:
                anchor = node.answer_id
                break
            between.append(node)
            compacted = node.record.get("subtype") == "compact_boundary"
            is_compacted = is_compacted or compacted or node.record.get("isCompactSummary")
        is_torn = anchor is None and bool(between[-1].parent)
        if is_torn or (anchor or "") == talk.answer_id:
            return
        self._end(talk)
        role = talk.thread.role
        if is_compacted and role == "main":
            role = "post-compaction"
        thread = talk.thread = Thread(role)
        if anchor is not None and anchor in self._turns:
            thread.last = self._turns[anchor]
            thread.num_messages = num_messages(self._draft.turns[thread.last])
        talk.answer_id = anchor or ""
        for node in reversed(between[1:]):
            if node.is_said:
                thread.pending += _asked(node)


def _events(path: Path) -> Iterator[_Event]:
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _Event(as_record(line, where), where)


def _first(events: Iterable[_Event], name: str) -> str:
    return next((str(item.record[name]) for item in events if item.record.get(name)), "")


def _asked(event: _Event) -> list[Message]:
    """What an event of type `user` sent: results of tools, then what was said beside them."""
    content = event.message.get("content")
    if isinstance(content, str):
        return [Message("user", content)]
    messages: list[Message] = []
    said: list[dict[str, Any]] = []
    for block in _blocks(event.message, event.where):
        if block.get("type") == "tool_result":
            text, images = _content(block.get("content") or "", event.where)
            name = wanted(block, "tool_use_id", str, event.where)
            messages.append(Message("tool", text, tool_call_id=name, images=images))
        else:
            said.append(block)
    text, images = _content(said, event.where)
    if text or images:
        messages.append(Message("user", text, images=images))
    return messages


def _blocks(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise StageError(f"{where}: the message's content is neither text nor a list of blocks")
    return content


def _content(content: Any, where: str) -> tuple[str, tuple[str, ...]]:
    blocks = _blocks({"content": content}, where)
    texts = [wanted(block, "text", str, where) for block in blocks if block.get("type") == "text"]
    images = [
        _image(wanted(block, "source", dict, where))
        for block in blocks
        if block.get("type") == "image"
    ]
    return "\n".join(texts), tuple(images)


def _image(source: dict[str, Any]) -> str:
    if "url" in source:
        return str(source["url"])
    return f"data:{source.get('media_type')};base64,{source.get('data')}"


def _call(block: dict[str, Any], where: str) -> ToolCall:
    arguments = orjson.dumps(wanted(block, "input", dict, where)).decode()
    return ToolCall(wanted(block, "id", str, where), wanted(block, "name", str, where), arguments)
