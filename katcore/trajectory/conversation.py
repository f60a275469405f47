"""Conversations of a trajectory as lists of messages that know which turn said them."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from katcore.schema.call import Message
from katcore.schema.rollout import Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a conversation, and the turn whose answer it is (-1: it came with a prompt)."""

    message: Message
    turn: int


def conversation(trajectory: Trajectory, number: int) -> list[Said]:
    """All messages of the conversation that turn `number` leaves, its answer included."""
    turn = trajectory.turns[number]
    parts = [_own(turn, number)]
    left = turn.num_shared_messages
    while left and turn.parent >= 0:
        number = turn.parent
        turn = trajectory.turns[number]
        parts.append(_own(turn, number)[: max(0, left - turn.num_shared_messages)])
        left = min(left, turn.num_shared_messages)
    return [said for part in reversed(parts) for said in part]


def num_messages(turn: Turn) -> int:
    """Messages of the conversation that a turn leaves, its answer included."""
    return turn.num_shared_messages + len(turn.messages) + 1


def leaves(turns: Sequence[Turn], kept: Container[int]) -> list[int]:
    """The turns among `kept` whose answers no later one of them has in its prompt by the tree."""
    inner: set[int] = set()
    for number, turn in enumerate(turns):
        if number not in kept:
            continue
        left, node = turn.num_shared_messages, turn.parent
        while node >= 0:
            if num_messages(turns[node]) <= left:
                inner.add(node)
            left = min(left, turns[node].num_shared_messages)
            node = turns[node].parent
    return [at for at in range(len(turns)) if at in kept and at not in inner]


def _own(turn: Turn, number: int) -> list[Said]:
    return [*(Said(message, -1) for message in turn.messages), Said(turn.message, number)]
