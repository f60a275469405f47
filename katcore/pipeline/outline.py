"""The tree of a rollout's turns as an outline: who goes on from whom, and in which role."""

from collections.abc import Sequence

from katcore.pipeline.chart import escape
from katcore.schema.rollout import Turn, TurnRole

_ASIDE: tuple[TurnRole, ...] = ("auxiliary", "discarded")
_MAX_LEVEL = 12
_SHOWN_CHARS = 90


def render(turns: Sequence[Turn]) -> str:
    """One line for each turn in call order, indented, with a link to where it stands in the page."""
    lines = [
        f'<li class="{escape(turn.role)}" style="--level:{min(level, _MAX_LEVEL)}">'
        f'<a href="#turn-{number}">{number}</a> {role(turn)} {_gist(turn)}'
        f" <small>{_branch(turns, number)}</small></li>"
        for number, (turn, level) in enumerate(zip(turns, levels(turns), strict=True))
    ]
    return f'<ul class="outline">{"".join(lines)}</ul>' if lines else "<p>No turn was recorded.</p>"


def role(turn: Turn) -> str:
    """The role of a turn as a label."""
    return f'<span class="role {escape(turn.role)}">{escape(turn.role)}</span>'


def parent_of(turns: Sequence[Turn], number: int) -> int:
    """The turn that turn `number` goes on from; -1 if it begins anew."""
    parent = turns[number].parent
    return parent if 0 <= parent < number else -1


def relation(turns: Sequence[Turn], number: int) -> str:
    """What turn `number` does with its parent, to be followed by the parent's name; "" if it has none."""
    parent = parent_of(turns, number)
    if parent < 0:
        return ""
    turn, before = turns[number], turns[parent]
    num_asked = before.num_shared_messages + len(before.messages)
    if turn.num_shared_messages > num_asked:
        return "goes on from"
    is_same = turn.num_shared_messages == num_asked and not turn.messages
    return "asks the same as" if is_same else "forks off"


def levels(turns: Sequence[Turn]) -> list[int]:
    """How far each turn is indented.

    Of the turns with the same parent one is its heir, and stands as far to the left as the parent: the last
    of the same conversation. The others branch off, one level further. Asides stand one further still.
    """
    heirs = _heirs(turns)
    columns: list[int] = []
    for number, turn in enumerate(turns):
        parent = parent_of(turns, number)
        if parent < 0:
            columns.append(int(turn.role == "subagent"))
        else:
            columns.append(columns[parent] + (heirs.get(parent) != number))
    return [column + (turn.role in _ASIDE) for column, turn in zip(columns, turns, strict=True)]


def _heirs(turns: Sequence[Turn]) -> dict[int, int]:
    """The heir of each turn that has one. An aside is an heir only where there is no other."""
    heirs: dict[int, int] = {}
    for is_aside in (True, False):
        for number, turn in enumerate(turns):
            parent = parent_of(turns, number)
            if parent >= 0 and (turn.role in _ASIDE) == is_aside and _is_same(turns[parent], turn):
                heirs[parent] = number
    return heirs


def _is_same(before: Turn, after: Turn) -> bool:
    """Whether two turns may be of one conversation."""
    is_known = before.role not in _ASIDE and after.role not in _ASIDE
    return not is_known or (before.role == "subagent") == (after.role == "subagent")


def _branch(turns: Sequence[Turn], number: int) -> str:
    """Where a turn comes from, unless it just goes on from the one before."""
    parent, does = parent_of(turns, number), relation(turns, number)
    if parent < 0:
        return "begins anew" if number else ""
    return "" if does == "goes on from" and parent == number - 1 else f"{does} {parent}"


def _gist(turn: Turn) -> str:
    """The beginning of an answer: its calls, or else its text."""
    calls = ", ".join(f"{call.name} {call.arguments}" for call in turn.tool_calls)
    said = " ".join((calls or turn.text)[: 10 * _SHOWN_CHARS].split())
    shown = said if len(said) <= _SHOWN_CHARS else f"{said[:_SHOWN_CHARS]} ..."
    return f"<code>{escape(shown)}</code>" if shown else "<small>(no text)</small>"
