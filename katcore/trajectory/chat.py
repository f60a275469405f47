"""Chat rows: one per leaf conversation, as messages with tools, for trainers that tokenise themselves."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, model_validator

from katcore.schema.call import Message, Tool
from katcore.schema.rollout import Rollout, TurnRole
from katcore.trajectory.canonical import canonical, chain
from katcore.trajectory.conversation import Said, conversation, leaves
from katcore.trajectory.failed import has_failed
from katcore.trajectory.wire import message_dict, tool_dicts

Row = dict[str, Any]


class ChatConfig(BaseModel):
    """Options of `chat`; 0 and empty mean no limit.

    `min_reward` None takes rollouts without a reward, too. A conversation over `max_turns` or `max_chars`
    loses turns from its middle, each with the results of its tool calls; what comes before its first answer
    and the last `keep_last` turns stay, and if that is still too much there is no row. `mask_failed` are
    beginnings of results: an answer that one of them came back to is not trained. `merge` makes one row of a
    conversation that an agent rewrote on its way, and trains answers where they came back. `tools_as_text`
    writes tools as JSON text, for loaders that make one type of all tools.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: tuple[TurnRole, ...] = ("main", "post-compaction")
    min_reward: float | None = 0.0
    max_turns: int = 0
    max_chars: int = 0
    keep_last: int = 1
    dedupe: bool = False
    mask_failed: tuple[str, ...] = ()
    merge: bool = False
    tools_as_text: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "ChatConfig":
        if self.keep_last < 1 or 0 < self.max_turns < self.keep_last:
            raise ValueError("keep_last has to be at least 1, and at most max_turns")
        return self


@dataclass(frozen=True, slots=True)
class _Line:
    message: Message
    is_trained: bool


class ChatFormatter:
    """Rows with `messages`, `tools`, and the rollout's facts under `katcore`.

    An answer that several leaf conversations share stands, and is trained, in the row of each. One that came
    back in a rewritten history is context there, for it was not given after these messages.
    """

    def __init__(self, config: ChatConfig) -> None:
        self._config = config

    def samples(self, rollouts: Iterable[Rollout]) -> Iterator[Row]:
        """See `Formatter.samples`."""
        seen: set[bytes] = set()
        for rollout in rollouts:
            if not self._is_wanted(rollout):
                continue
            for number, said in _conversations(rollout, self._config):
                lines = [_Line(item.message, item.turn >= 0) for item in said]
                tools = rollout.trajectory.tools(number)
                head, pairs = _pairs(lines)
                rest = self._shortened(head, [self._masked(pair) for pair in pairs])
                if rest is None or not any(line.is_trained for line in rest):
                    continue
                digest = _digest(tools, rest)
                if not (self._config.dedupe and digest in seen):
                    yield self._row(rollout, rest, tools, len(lines) - len(rest))
                seen.add(digest)

    def _is_wanted(self, rollout: Rollout) -> bool:
        least = self._config.min_reward
        return least is None or (rollout.reward is not None and rollout.reward >= least)

    def _masked(self, pair: list[_Line]) -> list[_Line]:
        answer = pair[0].message
        after, beginnings = [line.message for line in pair[1:]], self._config.mask_failed
        if has_failed(after, beginnings, has_tool_calls=bool(answer.tool_calls)):
            return [_Line(answer, is_trained=False), *pair[1:]]
        return pair

    def _shortened(self, head: list[_Line], pairs: list[list[_Line]]) -> list[_Line] | None:
        config = self._config
        num_chars = sum(map(_chars, head)) + sum(_chars(line) for pair in pairs for line in pair)
        first = 0
        while (0 < config.max_turns < len(pairs) - first) or 0 < config.max_chars < num_chars:
            if len(pairs) - first <= config.keep_last:
                return None
            num_chars -= sum(map(_chars, pairs[first]))
            first += 1
        return [*head, *(line for pair in pairs[first:] for line in pair)]

    def _row(
        self, rollout: Rollout, lines: Sequence[_Line], tools: Sequence[Tool], num_dropped: int
    ) -> Row:
        offered: Any = tool_dicts(tools)
        return {
            "messages": [
                {**message_dict(line.message), "train": line.is_trained} for line in lines
            ],
            "tools": orjson.dumps(offered).decode() if self._config.tools_as_text else offered,
            "katcore": {
                "rollout_id": rollout.id,
                "task_id": rollout.task_id,
                "reward": rollout.reward,
                "outcome": rollout.outcome.value,
                "scaffold": rollout.scaffold,
                "num_dropped_messages": num_dropped,
            },
        }


def _conversations(rollout: Rollout, config: ChatConfig) -> Iterator[tuple[int, list[Said]]]:
    """The conversation of each leaf among the kept turns, and that leaf's number."""
    trajectory = rollout.trajectory
    kept = [at for at, turn in enumerate(trajectory.turns) if turn.role in config.roles]
    answers: dict[bytes, list[int]] = {}
    for at in kept if config.merge else ():
        answers.setdefault(canonical(trajectory.turns[at].message), []).append(at)
    found: list[tuple[int, list[Said]]] = []
    held: set[int] = set()
    for number in reversed(leaves(trajectory.turns, set(kept))):
        whole = conversation(trajectory, number)
        used = {said.turn for said in whole}
        for place, said in enumerate(whole):
            turn = said.turn if said.turn in kept else -1
            if turn < 0 and said.message.role == "assistant":
                turn = _answered_by(answers.get(canonical(said.message), ()), used, number)
            used.add(turn)
            whole[place] = Said(said.message, turn)
        told = {said.turn for said in whole} - {-1}
        if not told <= held:
            held |= told
            found.append((number, whole))
    return reversed(found)


def _answered_by(turns: Iterable[int], used: set[int], before: int) -> int:
    return next((turn for turn in turns if turn < before and turn not in used), -1)


def _pairs(lines: list[_Line]) -> tuple[list[_Line], list[list[_Line]]]:
    """What comes before the first answer, and each answer with what came back to it."""
    head: list[_Line] = []
    pairs: list[list[_Line]] = []
    for line in lines:
        if line.message.role == "assistant":
            pairs.append([line])
        else:
            (pairs[-1] if pairs else head).append(line)
    return head, pairs


def _chars(line: _Line) -> int:
    message = line.message
    called = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning) + called


def _digest(tools: Sequence[Tool], lines: Sequence[_Line]) -> bytes:
    """That of the conversation, in which reasoning counts and the ids of tool calls do not."""
    messages = [line.message for line in lines]
    thoughts = "\0".join(message.reasoning for message in messages)
    return b"".join((*list(chain(tools, messages))[-1:], thoughts.encode()))
