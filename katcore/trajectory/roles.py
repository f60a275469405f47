"""What part a call plays in its session, found from structure alone: who took up which answer, and when.

A call takes up an answer that stands in its history. Calls tied in this way, or by asking the same, are one
conversation. One that began after another and ended before it is a sub-agent's; one without tools, beside
others with tools, is auxiliary; what is left is the agent's own. If it begins with a text that an earlier
call wrote, then that was a summary, and it goes on after a compaction.
"""

from collections.abc import Iterator, Sequence

from katcore.schema.call import ModelCall
from katcore.schema.rollout import TurnRole
from katcore.trajectory.canonical import canonical

_MIN_SUMMARY = 32
"""Characters; a shorter text may stand in a prompt by chance."""


def find_roles(calls: Sequence[ModelCall]) -> list[TurnRole]:
    """The role of each call of a session, in call order."""
    session = _Session(calls)
    roles: list[TurnRole] = ["auxiliary"] * len(calls)
    for numbers in session.with_tools:
        role: TurnRole = "main"
        if session.is_inside(numbers):
            role = "subagent"
        elif (summary := session.summary_before(numbers)) is not None:
            role = "post-compaction"
            roles[summary] = "auxiliary"
        for number in numbers:
            roles[number] = role
        for number in numbers[:-1]:
            if number not in session.taken:
                roles[number] = "discarded" if session.is_repeated(number) else "auxiliary"
    return roles


class _Session:
    """The conversations of a session, each as call numbers in order."""

    def __init__(self, calls: Sequence[ModelCall]) -> None:
        self._calls = calls
        self._index = {call.call_id: number for number, call in enumerate(calls)}
        self._parents = [self._index.get(call.parent, -1) for call in calls]
        self.taken: set[int] = set()
        self._joined = list(range(len(calls)))
        answers: dict[bytes, int] = {}
        for number, call in enumerate(calls):
            taken = list(self._takes_up(number, answers))
            self.taken.update(taken)
            for earlier in (*taken, self._first_asked(number)):
                self._joined[self._conversation(number)] = self._conversation(earlier)
            answers[canonical(call.generation.message)] = number
        groups: dict[int, list[int]] = {}
        for number in range(len(calls)):
            groups.setdefault(self._conversation(number), []).append(number)
        everything = sorted(groups.values())
        self.with_tools = [item for item in everything if self._has_tools(item[0])] or everything
        self._asked = [self._first_asked(number) for number in range(len(calls))]

    def is_inside(self, numbers: list[int]) -> bool:
        """Whether another conversation began before this one and ended after it."""
        return any(other[0] < numbers[0] and numbers[-1] < other[-1] for other in self.with_tools)

    def summary_before(self, numbers: list[int]) -> int | None:
        """The earlier call whose text stands in what this conversation begins with."""
        first = self._calls[numbers[0]]
        said = "\n".join(item.content for item in first.new_messages)
        for number in reversed(range(numbers[0])):
            text = self._calls[number].generation.text.strip()
            if len(text) >= _MIN_SUMMARY and text in said:
                return number
        return None

    def is_repeated(self, number: int) -> bool:
        """Whether the same prompt was asked more than once."""
        return self._asked.count(self._asked[number]) > 1

    def _conversation(self, number: int) -> int:
        """The call by which its conversation is known, so far; the way there is made shorter."""
        joined = self._joined
        while joined[number] != number:
            joined[number] = number = joined[joined[number]]
        return number

    def _takes_up(self, number: int, answers: dict[bytes, int]) -> Iterator[int]:
        call = self._calls[number]
        left, node = call.num_shared_messages, self._parents[number]
        while node >= 0:
            if self._calls[node].num_messages <= left:
                yield node
                break
            left = min(left, self._calls[node].num_shared_messages)
            node = self._parents[node]
        for message in call.new_messages:
            earlier = answers.get(canonical(message)) if message.role == "assistant" else None
            if earlier is not None and self._has_tools(earlier) == self._has_tools(number):
                yield earlier

    def _has_tools(self, number: int) -> bool:
        while self._calls[number].tools is None and self._parents[number] >= 0:
            number = self._parents[number]
        return bool(self._calls[number].tools)

    def _first_asked(self, number: int) -> int:
        """The first call that had this one's very prompt."""
        call = self._calls[number]
        node = self._parents[number]
        while not call.new_messages and node >= 0:
            num_asked = self._calls[node].num_messages - 1
            if num_asked == call.num_shared_messages:
                return self._first_asked(node)
            if num_asked < call.num_shared_messages:
                break
            node = self._parents[node]
        return number
