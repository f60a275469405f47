"""ATIF documents (1.0 to 1.8) as rollouts.

Ids and log-probabilities that a document holds are left out: nothing proves what they were sampled from.
A document that the formatter `atif` made gives its rollout's facts back.
"""

from pathlib import Path
from typing import Any

import orjson

from katcore.errors import StageError
from katcore.schema.call import Message, Tool, ToolCall
from katcore.schema.rollout import Outcome, Rollout, TurnRole, Verdict
from katcore.trajectory.importer.draft import (
    Draft,
    Thread,
    as_record,
    fitting,
    read_bytes,
    seconds,
    wanted,
)

_ROLES: tuple[TurnRole, ...] = ("main", "post-compaction", "subagent")


def read_atif(path: Path) -> Rollout:
    """The rollout of a document.

    Raises:
        StageError: the file is no ATIF document; names the file and the step.
    """
    document = as_record(read_bytes(path), str(path))
    version = wanted(document, "schema_version", str, str(path))
    if not version.startswith("ATIF-v1."):
        raise StageError(
            f"{path}: schema_version is {version!r}; ATIF-v1.0 to ATIF-v1.8 can be read"
        )
    draft = Draft()
    with fitting(str(path)):
        reader = _Reader(draft, str(path), document)
        reader.tell(document, Thread())
        reader.tell_rest()
    agent = wanted(document, "agent", dict, str(path))
    name = str(document.get("session_id") or document.get("trajectory_id") or path.stem)
    facts = {"scaffold": _scaffold(agent)} | _facts(document, str(path))
    return draft.rollout(name, **facts)


class _Reader:
    """Adds the turns of a document; sub-agents come where their results do, those without a place last."""

    def __init__(self, draft: Draft, path: str, document: dict[str, Any]) -> None:
        self._draft = draft
        self._path = path
        self.inner: dict[str, dict[str, Any]] = {}
        for at, one in enumerate(document.get("subagent_trajectories") or ()):
            name = wanted(one, "trajectory_id", str, f"{path}: subagent_trajectories[{at}]")
            self.inner[name] = one

    def tell(self, document: dict[str, Any], thread: Thread) -> None:
        """All steps of a document."""
        where = f"{self._path}: {document.get('trajectory_id') or 'document'}"
        agent = wanted(document, "agent", dict, where)
        for at, step in enumerate(wanted(document, "steps", list, where), 1):
            with fitting(f"{where}: step {at}"):
                self._step(step, agent, thread, f"{where}: step {at}")

    def tell_rest(self) -> None:
        """The sub-agents that no result names."""
        while self.inner:
            self.tell(self.inner.pop(next(iter(self.inner))), Thread("subagent"))

    def _step(self, step: Any, agent: dict[str, Any], thread: Thread, where: str) -> None:
        source = wanted(step, "source", str, where)
        if source not in ("system", "user", "agent"):
            raise StageError(f"{where}: source is {source!r}; it has to be system, user or agent")
        message = _message("assistant" if source == "agent" else source, step, where)
        if source == "agent" and not _is_context(step):
            thread.role = _role(step, thread.role)
            self._draft.answer(
                thread,
                message,
                model=str(step.get("model_name") or agent.get("model_name") or ""),
                at_s=seconds(step.get("timestamp")),
                tools=_tools(agent, where) if thread.last < 0 else None,
            )
        else:
            thread.pending.append(message)
        self._observe(step, thread, message, where)

    def _observe(self, step: dict[str, Any], thread: Thread, answer: Message, where: str) -> None:
        calls = [call.id for call in answer.tool_calls]
        for result in (step.get("observation") or {}).get("results") or ():
            for ref in result.get("subagent_trajectory_ref") or ():
                inner = self.inner.pop(str(ref.get("trajectory_id")), None)
                if inner is not None:
                    self.tell(inner, Thread("subagent"))
            if result.get("content") is None:
                continue
            caller = str(result.get("source_call_id") or (calls[0] if len(calls) == 1 else ""))
            text, images = _content(result["content"], where)
            role: Any = "tool" if caller else "user"
            thread.pending.append(Message(role, text, tool_call_id=caller, images=images))


def _scaffold(agent: dict[str, Any]) -> str:
    parts = (str(agent.get("name") or ""), str(agent.get("version") or ""))
    return " ".join(part for part in parts if part and part != "unknown")


def _is_context(step: dict[str, Any]) -> bool:
    """Whether an agent's step is no answer of a model: copied from elsewhere, or made by a program."""
    return bool(step.get("is_copied_context")) or step.get("llm_call_count") == 0


def _message(role: Any, step: dict[str, Any], where: str) -> Message:
    text, images = _content(step.get("message", ""), where)
    calls = tuple(
        ToolCall(
            wanted(call, "tool_call_id", str, where),
            wanted(call, "function_name", str, where),
            _arguments(call, where),
        )
        for call in step.get("tool_calls") or ()
    )
    return Message(role, text, str(step.get("reasoning_content") or ""), calls, "", images)


def _arguments(call: dict[str, Any], where: str) -> str:
    kept = ((call.get("extra") or {}).get("katcore") or {}).get("arguments")
    if isinstance(kept, str):
        return kept
    return orjson.dumps(wanted(call, "arguments", dict, where)).decode()


def _content(content: Any, where: str) -> tuple[str, tuple[str, ...]]:
    if isinstance(content, str):
        return content, ()
    if not isinstance(content, list):
        raise StageError(
            f"{where}: expected a text or a list of parts, found {type(content).__name__}"
        )
    texts = [str(part.get("text") or "") for part in content if part.get("type") == "text"]
    images = [str(part["source"]["path"]) for part in content if part.get("type") == "image"]
    return "\n".join(texts), tuple(images)


def _tools(agent: dict[str, Any], where: str) -> tuple[Tool, ...]:
    tools = []
    for definition in agent.get("tool_definitions") or ():
        given = definition.get("function", definition)
        name = wanted(given, "name", str, f"{where}: tool_definitions")
        schema = orjson.dumps(given.get("parameters") or {}).decode()
        tools.append(Tool(name, str(given.get("description") or ""), schema))
    return tuple(tools)


def _role(step: dict[str, Any], otherwise: TurnRole) -> TurnRole:
    kept = ((step.get("extra") or {}).get("katcore") or {}).get("role")
    return next((role for role in _ROLES if role == kept), otherwise)


def _facts(document: dict[str, Any], where: str) -> dict[str, Any]:
    """What a document of ours says of its rollout."""
    given = (document.get("extra") or {}).get("katcore")
    if not isinstance(given, dict):
        return {}
    try:
        return {
            "id": given["rollout_id"],
            "task_id": given["task_id"],
            "domain": given["domain"],
            "group": given["group"],
            "attempt": given["attempt"],
            "outcome": Outcome(given["outcome"]),
            "verdict": Verdict(given["reward"], given["reason"], given["metrics"]),
            "exit_reason": given["exit_reason"],
            "error": given["error"],
            "seconds": given["seconds"],
            "scaffold": given["scaffold"],
        }
    except (KeyError, ValueError) as error:
        raise StageError(f"{where}: extra.katcore does not fit: {error!r}") from error
