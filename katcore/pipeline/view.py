"""Rollouts as HTML pages to read offline: one page for each, down to its tokens, and an index.

Everything in a rollout is untrusted text: the task's, the sandbox's and the model's.
"""

import hashlib
import re
from itertools import chain, count, islice
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from katcore.errors import ConfigError
from katcore.pipeline import mask, outline, speech
from katcore.pipeline.browse import mark
from katcore.pipeline.chart import escape
from katcore.pipeline.document import document, table, write
from katcore.pipeline.recorded import ROLLOUTS, read_rollouts, rollout_file
from katcore.schema.rollout import Outcome, Rollout, Visit

TOKENS, INDEX = "tokens.json", "index.html"
_SHOWN_CHARS = 300
_STYLES = ("page.css", "view.css")
_TEXTS = TypeAdapter(dict[int, str])
_FAULTS = {
    Outcome.SCORED: "the verifier gave a verdict",
    Outcome.SANDBOX_FAILED: "the sandbox's fault; it has no reward",
    Outcome.ENGINE_FAILED: "the engine's fault; it has no reward",
    Outcome.SCAFFOLD_FAILED: "the scaffold's fault; it has no reward",
    Outcome.VERIFIER_FAILED: "the verifier's fault; it has no reward",
    Outcome.CANCELLED: "stopped from outside, nobody's fault; it has no reward",
}


def write_views(source: Path, out: Path | None = None, *, limit: int = 0) -> Path:
    """Write a page for each rollout of a file (with `limit`, of the first ones), and an index; returns it.

    `source` is the file, or a folder with a `rollouts.jsonl`; a `tokens.json` beside it has the text of each
    token id. One rollout is in memory at a time. Without `out` the pages go to `view/` beside the file,
    or to `view/` beside `stages/`, for what a stage wrote is never changed.

    Raises:
        ConfigError: there is no such file, it holds no rollout, or the pages cannot be written.
        StageError: a line of it is no rollout.
    """
    path = rollout_file(source)
    try:
        texts = _texts(path.with_name(TOKENS))
        folder = out or _beside(path)
        rows: list[list[str]] = []
        taken = {Path(INDEX).stem}
        for rollout in islice(read_rollouts(path), limit or None):
            folder.mkdir(parents=True, exist_ok=True)
            name = page_name(rollout.id, taken)
            write(folder / name, render(rollout, texts))
            rows.append(_row(rollout, name))
        if not rows:
            raise ConfigError(
                f"{path}: holds no rollout; a stage writes one line when a rollout has ended"
            )
        write(folder / INDEX, _index(path, rows))
    except OSError as error:
        raise ConfigError(
            f"{error.filename or path}: {error.strerror}; give a file that can be read,"
            " and with --out a folder that can be written"
        ) from error
    return folder / INDEX


def render(rollout: Rollout, tokens: mask.Texts) -> str:
    """The page of one rollout. `tokens` has the text of each token id; ids without one are shown as such."""
    turns = rollout.trajectory.turns
    room, allotted = speech.Room(), mask.allot(turns)
    parts = [
        f'<p><a href="{INDEX}">All rollouts</a></p><h1>{escape(rollout.id)}</h1>',
        _head(rollout),
        f"<h2>Outline: {len(turns)} turns</h2>{outline.render(turns)}",
        f"<h2>Turns</h2>{mask.legend()}",
    ]
    for number, turn in enumerate(turns):
        for_answer, for_prompt = allotted[number]
        trained = mask.training(rollout, turn)
        is_offer = turn.tools is not None or outline.parent_of(turns, number) < 0
        parts += [
            f'<section class="turn {escape(turn.role)}" id="turn-{number}">',
            f'<h3><a href="#turn-{number}">Turn {number}</a> {outline.role(turn)}</h3>',
            _facts(rollout, number),
            speech.tools(turn.tools or ()) if is_offer else "",
            *(speech.message(said, room) for said in turn.messages),
            mask.prompt(turn, tokens, for_prompt),
            speech.answer(turn.message),
            mask.answer(turn, tokens, for_answer, trained),
            "</section>",
        ]
    parts.append(f"<h2>Verdict</h2>{_verdict(rollout)}")
    return document(f"Rollout {rollout.id}", "".join(parts), styles=_STYLES)


def page_name(rollout_id: str, taken: set[str]) -> str:
    """A file name for a rollout's page that no other has; it is added to `taken`.

    It is the id, or if that is no safe name, what is left of it with a digest.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", rollout_id)[:100].lstrip(".") or "rollout"
    if safe != rollout_id:
        digest = hashlib.sha256(rollout_id.encode(errors="surrogatepass")).hexdigest()[:8]
        safe = f"{safe}-{digest}"
    names = chain([safe], (f"{safe}-{number}" for number in count(2)))
    # Some file systems do not tell upper from lower case.
    name = next(name for name in names if name.lower() not in taken)
    taken.add(name.lower())
    return f"{name}.html"


def _head(rollout: Rollout) -> str:
    seconds = ", ".join(f"{escape(name)} {value:.1f}" for name, value in rollout.seconds.items())
    group = f" <small>{escape(rollout.group)}</small>" if rollout.group else ""
    facts = {
        "task": f"<code>{escape(rollout.task_id)}</code>{group}, attempt {rollout.attempt}",
        "domain": escape(rollout.domain),
        "scaffold": escape(rollout.scaffold),
        "outcome": f"{_outcome(rollout)} <small>{escape(_FAULTS[rollout.outcome])}</small>",
        "verdict": _verdict(rollout),
        "exit reason": escape(rollout.exit_reason),
        "error": speech.block(rollout.error),
        "went to": "<br>".join(map(_visit, rollout.visits)),
        "seconds": f"{seconds}; in all {_seconds(rollout):.1f}" if seconds else "",
    }
    rows = (f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items() if value)
    return f'<dl class="head">{"".join(rows)}</dl>'


def _outcome(rollout: Rollout) -> str:
    return f'<span class="outcome {escape(rollout.outcome)}">{escape(rollout.outcome)}</span>'


def _visit(visit: Visit) -> str:
    what = visit.refused or f"{visit.address}, sent {visit.sent:,} bytes, got {visit.received:,}"
    return f"<code>{escape(visit.host)}:{visit.port}</code> <small>{escape(what)}</small>"


def _kinds(rollout: Rollout) -> str:
    kinds = ", ".join(dict.fromkeys(flag.kind for flag in rollout.verdict.flags))
    return f' <b class="flag">flagged: {escape(kinds)}</b>' if kinds else ""


def _verdict(rollout: Rollout) -> str:
    verdict = rollout.verdict
    reward = "" if rollout.reward is None else f" reward {rollout.reward:g}"
    metrics = (
        f"<li>{escape(name)} <b>{value:g}</b></li>" for name, value in verdict.metrics.items()
    )
    shown = "".join(metrics)
    flags = "".join(
        f'<p class="flag"><b>flagged: {escape(flag.kind)}</b> {escape(flag.detail)}</p>'
        for flag in verdict.flags
    )
    live = " <small>live: in the agent's own sandbox</small>" if verdict.is_live else ""
    return (
        f'<div class="verdict">{mark(rollout.reward)}{reward}{live}{flags}{speech.block(verdict.reason)}'
        f"{f'<ul>{shown}</ul>' if shown else ''}</div>"
    )


def _facts(rollout: Rollout, number: int) -> str:
    """Where a turn comes from and what it took."""
    turns = rollout.trajectory.turns
    turn, parent = turns[number], outline.parent_of(turns, number)
    origin = "begins anew"
    if parent >= 0:
        before = f'<a href="#turn-{parent}">turn {parent}</a>'
        origin = (
            f"{outline.relation(turns, number)} {before}, with which it shares"
            f" {turn.num_shared_messages:,} messages and {turn.num_shared:,} tokens"
        )
    exact = "exact"
    if not turn.is_exact:
        exact = '<b class="failed">not exact: an answer in its prompt stands there by other ids</b>'
    after_s = turn.started_s - turns[0].started_s
    facts = (
        origin,
        f"{len(turn.messages):,} new messages",
        f"policy {escape(turn.policy_version)}",
        escape(turn.origin),
        exact,
        f"asked at {after_s:.1f} s, answered in {turn.seconds:.2f} s",
    )
    return f'<p class="facts">{"; ".join(facts)}</p>'


def _row(rollout: Rollout, name: str) -> list[str]:
    turns = rollout.trajectory.turns
    reward = "" if rollout.reward is None else f"{rollout.reward:g}"
    return [
        f'<a href="{name}">{escape(rollout.id)}</a>',
        escape(rollout.task_id),
        escape(rollout.scaffold),
        _outcome(rollout) + _kinds(rollout),
        escape(rollout.exit_reason[:_SHOWN_CHARS]),
        reward,
        f"{len(turns):,}",
        f"{sum(len(turn.prompt_ids) + len(turn.ids) for turn in turns):,}",
        f"{_seconds(rollout):,.1f}",
    ]


def _index(path: Path, rows: list[list[str]]) -> str:
    names = ("rollout", "task", "scaffold", "outcome", "exit reason")
    numbers = ("reward", "turns", "tokens", "seconds")
    shown = table((*names, *numbers), rows, num_text=len(names))
    title = f"Rollouts of {path.name}"
    body = f"<h1>{escape(title)}</h1><p>{len(rows):,} of them, as they ended.</p>{shown}"
    return document(title, body, styles=_STYLES)


def _seconds(rollout: Rollout) -> float:
    return sum(rollout.seconds.values())


def _beside(path: Path) -> Path:
    folder = path.resolve().parent
    stages = next((parent for parent in folder.parents if parent.name == "stages"), None)
    out = stages.parent / "view" / folder.relative_to(stages) if stages else folder / "view"
    return out if path.name == ROLLOUTS else out / path.stem


def _texts(path: Path) -> dict[int, str]:
    if not path.exists():
        return {}
    try:
        return _TEXTS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path}: expected a JSON object with the text of each token id, found something else;"
            " without this file ids are shown"
        ) from error
