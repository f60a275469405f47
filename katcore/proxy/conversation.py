"""From the messages that an agent sends to token ids: what was sampled comes back as it was sampled.

Text that an agent sends back is never tokenised again where its ids are on record. A conversation that goes
on takes up the very ids of the call before. Where the agent rewrote history, the prompt is put together anew,
with recorded ids for every answer that still stands in it; only what nobody answered is made from its text.
Nothing of a prompt is ever trained: a sampled token belongs to the call that sampled it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from katcore.protocols import Engine
from katcore.schema.call import Message, ModelCall, Tool
from katcore.trajectory.canonical import canonical, chain, extend
from katcore.trajectory.prefix import num_common


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids for a request, and what it shares with an earlier call (`parent`, "" for none)."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    ids: tuple[int, ...]
    parent: str
    num_shared_messages: int
    num_shared: int
    num_retokenised: int
    digests: tuple[bytes, ...]
    ends: tuple[tuple[int, "_End"], ...]
    """Where recorded answers end in it, after how many messages."""


@dataclass(frozen=True, slots=True)
class _End:
    """A beginning of a conversation that ends with an answer: its ids, and answers that nobody gave."""

    num_ids: int
    num_retokenised: int


@dataclass(frozen=True, slots=True)
class _Node:
    """The ids of a call's conversation, its answer included: some of the parent's, then its own."""

    parent: "_Node | None"
    num_shared: int
    ids: tuple[int, ...]

    def beginning(self, num: int) -> list[int]:
        parts: list[tuple[int, ...]] = []
        node: _Node | None = self
        while node is not None and num > 0:
            if num > node.num_shared:
                parts.append(node.ids[: num - node.num_shared])
                num = node.num_shared
            node = node.parent
        return [number for part in reversed(parts) for number in part]


class Conversations:
    """All conversations of one session, by their digests."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._nodes: dict[str, _Node] = {}
        self._lengths: dict[str, int] = {}
        self._first: dict[bytes, str] = {}
        self._ends: dict[bytes, tuple[str, _End]] = {}
        self._answers: dict[bytes, tuple[int, ...]] = {}

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Prompt:
        """The ids for `messages`, and the call whose conversation shares most messages with them."""
        sent, offered = tuple(messages), tuple(tools)
        digests = tuple(chain(offered, sent))
        known = next((num for num in range(len(sent), 0, -1) if digests[num] in self._first), 0)
        parent = self._first[digests[known]] if known else ""
        ids, ends, num_retokenised = self._ids(sent, offered, digests)
        num_shared = self._shared(ids, parent, digests[known])
        return Prompt(sent, offered, ids, parent, known, num_shared, num_retokenised, digests, ends)

    def record(self, call: ModelCall, prompt: Prompt) -> None:
        """Remember a call.

        An answer cut off at its length has no end-of-turn token, so no conversation goes on from its ids.
        """
        made = call.generation
        parent = self._nodes.get(call.parent)
        self._nodes[call.call_id] = _Node(parent, call.num_shared, call.new_prompt_ids + made.ids)
        self._lengths[call.call_id] = call.num_ids
        for digest in prompt.digests[1:]:
            self._first.setdefault(digest, call.call_id)
        for num_messages, end in prompt.ends:
            self._ends.setdefault(prompt.digests[num_messages], (call.call_id, end))
        digest = extend(prompt.digests[-1], made.message)
        self._first.setdefault(digest, call.call_id)
        if made.finish == "stop":
            end = _End(call.num_ids, call.num_retokenised)
            self._ends.setdefault(digest, (call.call_id, end))
            self._answers[canonical(made.message)] = made.ids

    def _ids(
        self, sent: tuple[Message, ...], tools: tuple[Tool, ...], digests: tuple[bytes, ...]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, _End], ...], int]:
        """Ids of the whole prompt, where recorded answers end in it, and how many were not recorded."""
        start = next((num for num in range(len(sent), 0, -1) if digests[num] in self._ends), 0)
        ids: list[int] = []
        num_retokenised = 0
        if start:
            call_id, end = self._ends[digests[start]]
            ids = self._nodes[call_id].beginning(end.num_ids)
            num_retokenised = end.num_retokenised
        ends = []
        for at in range(start, len(sent)):
            if sent[at].role != "assistant":
                continue
            answer = self._answers.get(canonical(sent[at]))
            if answer is None:
                num_retokenised += 1
                continue
            ids += self._engine.encode(sent[:at], tools=tools, start=start)
            ids += answer
            start = at + 1
            ends.append((start, _End(len(ids), num_retokenised)))
        ids += self._engine.encode(sent, tools=tools, start=start)
        return tuple(ids), tuple(ends), num_retokenised

    def _shared(self, ids: tuple[int, ...], parent: str, digest: bytes) -> int:
        """How many ids the prompt has in common with the beginning of the parent's conversation."""
        if not parent:
            return 0
        whole = self._lengths[parent]
        holder, end = self._ends.get(digest, ("", None))
        if holder == parent and end and end.num_ids == whole:
            return whole
        theirs = self._nodes[parent].beginning(whole)
        return num_common(ids, theirs)
