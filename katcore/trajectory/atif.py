"""Rollouts as ATIF documents: Harbor's Agent Trajectory Interchange Format, version 1.8.

The format is one line of steps per conversation. The agent's own turns, those after a compaction among them,
are the document; each sub-agent is a document inside it, named where its result came back. Auxiliary and
discarded turns are only counted. What the format has no word for is under `extra.katcore`.

https://harborframework.com/docs/trajectory-format
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from katcore.schema.call import Message, ToolCall
from katcore.schema.rollout import Rollout, Trajectory, Turn
from katcore.trajectory.canonical import canonical
from katcore.trajectory.conversation import conversation
from katcore.trajectory.wire import tool_dicts

VERSION = "ATIF-v1.8"
Document = dict[str, Any]


class AtifConfig(BaseModel):
    """Options of `atif`: whether steps carry ids and log-probabilities, and each prompt's ids, too.

    Prompts hold all that was said before, so their ids grow with the square of the turns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_ids: bool = True
    prompt_ids: bool = True


class AtifFormatter:
    """One document per rollout with a turn of the agent's own, whatever its outcome."""

    def __init__(self, config: AtifConfig) -> None:
        self._config = config

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Document]:
        """See `Formatter.samples`."""
        for rollout in rollouts:
            turns = rollout.trajectory.turns
            main = [at for at, turn in enumerate(turns) if turn.role in ("main", "post-compaction")]
            if main:
                yield self._document(rollout, main)

    def _document(self, rollout: Rollout, main: list[int]) -> Document:
        trajectory = rollout.trajectory
        groups = [main, *_subagents(trajectory)]
        steps = {at: _Steps(trajectory, numbers, self._config) for at, numbers in enumerate(groups)}
        named = {at: f"{trajectory.session_id}/subagent-{at}" for at in range(1, len(groups))}
        for at, name in named.items():
            around = _around(groups, at)
            steps[around].refer(name, trajectory.session_id, groups[at][0])
        inner = [
            {"trajectory_id": name, **_conversation(rollout, groups[at], steps[at].steps)}
            for at, name in named.items()
        ]
        document: Document = {
            "schema_version": VERSION,
            "session_id": trajectory.session_id,
            "trajectory_id": trajectory.session_id,
            **_conversation(rollout, main, steps[0].steps),
            "extra": {"katcore": _facts(rollout, groups)},
        }
        if inner:
            document["subagent_trajectories"] = [
                {"schema_version": VERSION, **one} for one in inner
            ]
        return document


class _Steps:
    """The steps of one conversation, told in the order in which its turns were asked.

    Agents send all of a history with every turn, sometimes changed. A message becomes a step the first time
    it is sent; sent more often within one prompt than before, it was said again.
    """

    def __init__(self, trajectory: Trajectory, numbers: Sequence[int], config: AtifConfig) -> None:
        self.steps: list[dict[str, Any]] = []
        self._config = config
        self._trajectory = trajectory
        self._told: Counter[bytes] = Counter()
        self._callers: dict[str, int] = {}
        self._at_turn: dict[int, int] = {}
        for number in numbers:
            self._tell(number)

    def refer(self, name: str, session_id: str, number: int) -> None:
        """Name a sub-agent, which began with turn `number`, where its result came back."""
        before = [step for turn, step in self._at_turn.items() if turn < number]
        if not before:
            return
        step = self.steps[before[-1]]
        asked = self._trajectory.turns[number].messages
        call = _asking(step.get("tool_calls", []), asked)
        results = step.setdefault("observation", {"results": []})["results"]
        result = next(
            (item for item in results if call and item.get("source_call_id") == call), None
        )
        if result is None:
            result = {"source_call_id": call} if call else {}
            results.append(result)
        refs = result.setdefault("subagent_trajectory_ref", [])
        refs.append({"trajectory_id": name, "session_id": session_id})

    def _tell(self, number: int) -> None:
        counts: Counter[bytes] = Counter()
        *asked, _ = conversation(self._trajectory, number)
        for said in asked:
            digest = canonical(said.message)
            counts[digest] += 1
            if counts[digest] > self._told[digest]:
                self._told[digest] += 1
                self._add_message(said.message)
        turn = self._trajectory.turns[number]
        self._told[canonical(turn.message)] += 1
        self._at_turn[number] = len(self.steps)
        self._add_answer(turn.message)
        step = self.steps[-1]
        step["llm_call_count"] = 1
        if turn.policy_version:
            step["model_name"] = turn.policy_version
        if turn.started_s:
            step["timestamp"] = datetime.fromtimestamp(turn.started_s, UTC).isoformat()
        if metrics := self._metrics(number):
            step["metrics"] = metrics
        step["extra"] = {"katcore": {"turn": number, **_turn_facts(turn)}}

    def _add_message(self, message: Message) -> None:
        if message.role == "assistant":
            self._add_answer(message)
            self.steps[-1]["is_copied_context"] = True
        elif message.role == "tool" and any(step["source"] == "agent" for step in self.steps):
            self._observe(message)
        else:
            source = "system" if message.role == "system" else "user"
            self._add(source, message)

    def _add_answer(self, message: Message) -> None:
        step = self._add("agent", message)
        if message.reasoning:
            step["reasoning_content"] = message.reasoning
        calls = [
            _call(call, f"call-{len(self.steps)}-{at}")
            for at, call in enumerate(message.tool_calls)
        ]
        if calls:
            step["tool_calls"] = calls
        for call in calls:
            self._callers[call["tool_call_id"]] = len(self.steps) - 1

    def _observe(self, message: Message) -> None:
        at = self._callers.get(message.tool_call_id)
        result: dict[str, Any] = {"content": _content(message)}
        if at is None:
            at = max(n for n, step in enumerate(self.steps) if step["source"] == "agent")
        else:
            result = {"source_call_id": message.tool_call_id, **result}
        self.steps[at].setdefault("observation", {"results": []})["results"].append(result)

    def _add(self, source: str, message: Message) -> dict[str, Any]:
        step = {"step_id": len(self.steps) + 1, "source": source, "message": _content(message)}
        self.steps.append(step)
        return step

    def _metrics(self, number: int) -> dict[str, Any]:
        turn = self._trajectory.turns[number]
        if not turn.ids:
            return {}
        metrics: dict[str, Any] = {
            "prompt_tokens": turn.num_shared + len(turn.prompt_ids),
            "completion_tokens": len(turn.ids),
        }
        if self._config.token_ids:
            metrics["completion_token_ids"] = list(turn.ids)
            if turn.origin == "sampled":
                metrics["logprobs"] = list(turn.logprobs)
        if self._config.token_ids and self._config.prompt_ids:
            metrics["prompt_token_ids"] = _prompt_ids(self._trajectory.turns, number)
        return metrics


def _conversation(
    rollout: Rollout, numbers: Sequence[int], steps: Sequence[Mapping[str, Any]]
) -> Document:
    """What a document and a sub-agent's have in common."""
    turns = rollout.trajectory.turns
    name, _, version = rollout.scaffold.partition(" ")
    agent: dict[str, Any] = {"name": name or "unknown", "version": version or "unknown"}
    if model := turns[numbers[-1]].policy_version:
        agent["model_name"] = model
    if tools := rollout.trajectory.tools(numbers[-1]):
        agent["tool_definitions"] = tool_dicts(tools)
    measured = [step["metrics"] for step in steps if "metrics" in step]
    final: dict[str, Any] = {"total_steps": len(steps)}
    if measured:
        final["total_prompt_tokens"] = sum(item["prompt_tokens"] for item in measured)
        final["total_completion_tokens"] = sum(item["completion_tokens"] for item in measured)
    return {"agent": agent, "steps": list(steps), "final_metrics": final}


def _facts(rollout: Rollout, groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {
        "rollout_id": rollout.id,
        "task_id": rollout.task_id,
        "domain": rollout.domain,
        "group": rollout.group,
        "attempt": rollout.attempt,
        "outcome": rollout.outcome.value,
        "reward": rollout.reward,
        "reason": rollout.verdict.reason,
        "metrics": rollout.verdict.metrics,
        "exit_reason": rollout.exit_reason,
        "error": rollout.error,
        "seconds": rollout.seconds,
        "scaffold": rollout.scaffold,
        "num_turns_left_out": len(rollout.trajectory.turns) - sum(map(len, groups)),
    }


def _turn_facts(turn: Turn) -> dict[str, Any]:
    return {"role": turn.role, "origin": turn.origin, "is_exact": turn.is_exact}


def _subagents(trajectory: Trajectory) -> list[list[int]]:
    """The turns of each sub-agent: a turn goes on with the latest whose answer it was asked after."""
    turns = trajectory.turns
    group_of: dict[int, int] = {}
    by_answer: dict[bytes, int] = {}
    groups: list[list[int]] = []
    for number, turn in enumerate(turns):
        if turn.role != "subagent":
            continue
        *asked, _ = conversation(trajectory, number)
        taken = [
            said.turn if said.turn >= 0 else by_answer.get(canonical(said.message), -1)
            for said in asked
            if said.message.role == "assistant"
        ]
        earlier = [group_of[at] for at in taken if at in group_of]
        if not earlier:
            groups.append([])
        group_of[number] = earlier[-1] if earlier else len(groups) - 1
        groups[group_of[number]].append(number)
        by_answer[canonical(turn.message)] = number
    return groups


def _around(groups: Sequence[Sequence[int]], at: int) -> int:
    """The innermost conversation that began before one and ended after it; the agent's own if none."""
    first, last = groups[at][0], groups[at][-1]
    around = [n for n, other in enumerate(groups) if other[0] < first and last < other[-1]]
    return max(around, key=lambda n: groups[n][0], default=0)


def _asking(calls: Sequence[Mapping[str, Any]], asked: Sequence[Message]) -> str:
    """The id of the tool call that started a conversation which begins with `asked`; "" if there is none."""
    said = {message.content for message in asked if message.role == "user"}
    for call in calls:
        values = [value for value in call["arguments"].values() if isinstance(value, str) and value]
        if any(value in text for value in values for text in said):
            return str(call["tool_call_id"])
    return str(calls[0]["tool_call_id"]) if calls else ""


def _call(call: ToolCall, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"tool_call_id": call.id or name, "function_name": call.name}
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError:
        arguments = None
    if isinstance(arguments, dict):
        return {**entry, "arguments": arguments}
    return {**entry, "arguments": {}, "extra": {"katcore": {"arguments": call.arguments}}}


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.content
    text = [{"type": "text", "text": message.content}] if message.content else []
    return [*text, *({"type": "image", "source": _source(url)} for url in message.images)]


def _source(url: str) -> dict[str, str]:
    kind = url.partition(";")[0].removeprefix("data:") if url.startswith("data:") else ""
    if kind not in _IMAGES:
        ending = url.rpartition(".")[2].lower()
        kind = f"image/{ending}" if f"image/{ending}" in _IMAGES else "image/png"
        kind = "image/jpeg" if ending == "jpg" else kind
    return {"media_type": kind, "path": url}


_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")


def _prompt_ids(turns: Sequence[Turn], number: int) -> list[int]:
    turn = turns[number]
    parts, left = [turn.prompt_ids], turn.num_shared
    while left and turn.parent >= 0:
        turn = turns[turn.parent]
        parts.append((turn.prompt_ids + turn.ids)[: max(0, left - turn.num_shared)])
        left = min(left, turn.num_shared)
    return [number for part in reversed(parts) for number in part]
