"""Rollouts to look at: the same held-out tasks under every model, side by side.

Everything in a rollout is untrusted text: the task's, the sandbox's and the model's.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from katcore.pipeline.chart import escape
from katcore.schema.codec import read_lines
from katcore.schema.rollout import Rollout, Turn

_MAX_TASKS = 40
_MAX_PAGE_CHARS = 2_000_000
_MAX_TEXT_CHARS = 2000
_MAX_TURNS = 30
Sides = Mapping[str, Path]
"""Files of rollouts by column, in the order of the columns."""


def render(sides: Sides) -> str:
    """Tasks as HTML, each with its rollout of every column; files are read one line at a time."""
    rewards = {column: dict(_rewards(path)) for column, path in sides.items()}
    chosen = choose(rewards)
    wanted = set(chosen)
    rollouts: dict[str, dict[str, Rollout]] = defaultdict(dict)
    for column, path in sides.items():
        for rollout in _read(path):
            if rollout.task_id in wanted:
                rollouts[rollout.task_id][column] = rollout
    num_all = len(set().union(*rewards.values())) if rewards else 0
    parts: list[str] = []
    num_chars = 0
    for task_id in chosen:
        part = _task(task_id, rollouts[task_id], tuple(sides))
        num_chars += len(part)
        if parts and num_chars > _MAX_PAGE_CHARS:
            break
        parts.append(part)
    head = f"<p>{len(parts)} of {num_all} held-out tasks, greedy; every pattern of passing is shown.</p>"
    return head + "".join(parts)


def choose(rewards: Mapping[str, Mapping[str, float | None]], num: int = _MAX_TASKS) -> list[str]:
    """At most `num` task ids: in turn from each pattern of passing and failing, rare ones too."""
    patterns: dict[tuple[bool, ...], list[str]] = defaultdict(list)
    for task_id in sorted(set().union(*rewards.values()) if rewards else set()):
        pattern = tuple(column.get(task_id) == 1.0 for column in rewards.values())
        patterns[pattern].append(task_id)
    queues = [patterns[pattern] for pattern in sorted(patterns)]
    chosen: list[str] = []
    for place in range(max(map(len, queues), default=0)):
        chosen += [queue[place] for queue in queues if place < len(queue)]
    return chosen[:num]


def mark(reward: float | None) -> str:
    """One word for a verdict, as HTML."""
    if reward is None:
        return '<span class="mark lost">unscored</span>'
    if reward == 1.0:
        return '<span class="mark passed">passed</span>'
    return f'<span class="mark failed">failed{f" ({reward:g})" if reward else ""}</span>'


def _rewards(path: Path) -> Iterator[tuple[str, float | None]]:
    return ((rollout.task_id, rollout.reward) for rollout in _read(path))


def _read(path: Path) -> Iterator[Rollout]:
    return read_lines(Rollout, path) if path.exists() else iter(())


def _task(task_id: str, rollouts: Mapping[str, Rollout], columns: tuple[str, ...]) -> str:
    some = next(iter(rollouts.values()))
    marks = "".join(
        f"<span class=side>{escape(column)} {mark(rollouts[column].reward)}</span>"
        for column in columns
        if column in rollouts
    )
    bodies = "".join(_side(column, rollouts[column]) for column in columns if column in rollouts)
    return (
        f"<details><summary><code>{escape(task_id)}</code> <small>{escape(some.group)}</small> {marks}"
        f"</summary><blockquote>{_text(_prompt(some))}</blockquote>"
        f'<div class="sides">{bodies}</div></details>'
    )


def _side(column: str, rollout: Rollout) -> str:
    turns = [turn for turn in rollout.trajectory.turns if turn.role == "main"]
    lines = [
        f"<li><pre class=command>{_text(turn.text) or '(nothing)'}</pre>{_output(turns, at)}</li>"
        for at, turn in enumerate(turns[:_MAX_TURNS])
    ]
    if len(turns) > _MAX_TURNS:
        lines.append(f"<li>{len(turns) - _MAX_TURNS} more turns</li>")
    facts = [f"ended: {rollout.exit_reason or rollout.outcome}"]
    facts += [why for why in (rollout.verdict.reason, rollout.error) if why]
    return (
        f"<section><h4>{escape(column)} {mark(rollout.reward)}</h4><ol>{''.join(lines)}</ol>"
        f"<p class=facts>{_text('; '.join(facts))}</p></section>"
    )


def _output(turns: list[Turn], at: int) -> str:
    """What the scaffold answered to turn `at`: the user's messages of the turn after it."""
    if at + 1 == len(turns):
        return ""
    said = [message.content for message in turns[at + 1].messages if message.role == "user"]
    return f"<pre class=output>{_text(chr(10).join(said))}</pre>"


def _prompt(rollout: Rollout) -> str:
    turns = rollout.trajectory.turns
    return "\n".join(message.content for message in turns[0].messages) if turns else ""


def _text(text: str) -> str:
    if len(text) > _MAX_TEXT_CHARS:
        text = f"{text[:_MAX_TEXT_CHARS]} [{len(text) - _MAX_TEXT_CHARS} more characters]"
    return escape(text)
