"""The tokens of a turn as HTML: how likely each was when it was drawn, and whether a loss trains it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from katcore.pipeline.chart import escape
from katcore.schema.rollout import Rollout, Turn
from katcore.trajectory.formats import TRAINED

MAX_TOKENS = 50_000
"""Tokens of one page; a browser is slow with more."""
_LEAST = (0.9, 0.5, 0.1, 0.01, 0.001)
"""The least probabilities of the colours, but for the last colour: that is of all below."""
_EDGES = tuple(math.log(probability) for probability in _LEAST)
Texts = Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Training:
    """What training makes of an answer: `name` is a CSS class, `said` is for people."""

    name: str
    said: str


def training(rollout: Rollout, turn: Turn) -> Training:
    """Whether a loss trains the answer of a turn, by the rules of the tree formatter and the objectives."""
    if not turn.ids:
        return Training("untrained", "not trained: no token ids")
    if turn.role not in TRAINED:
        return Training("untrained", f"not trained: {turn.role}")
    if rollout.reward is None:
        return Training("untrained", "not trained: the rollout was not scored")
    if turn.origin != "sampled":
        return Training("imitated", f"trained by fine-tuning only: {turn.origin}, not sampled")
    return Training("trained", "trained")


def allot(turns: Sequence[Turn], limit: int = MAX_TOKENS) -> list[tuple[int, int]]:
    """How many tokens of each turn's answer and of its prompt a page shows; answers come first."""
    answers = _shares([len(turn.ids) for turn in turns], limit)
    prompts = _shares([len(turn.prompt_ids) for turn in turns], limit - sum(answers))
    return list(zip(answers, prompts, strict=True))


def answer(turn: Turn, texts: Texts, num_shown: int, trained: Training) -> str:
    """The tokens of a turn's answer, collapsed; nothing if it has no ids."""
    if not turn.ids:
        return ""
    is_drawn = turn.origin == "sampled" and len(turn.logprobs) == len(turn.ids)
    logprobs = turn.logprobs if is_drawn else (None,) * len(turn.ids)
    shown = zip(turn.ids[:num_shown], logprobs, strict=False)
    spans = "".join(_span(token, logprob, texts) for token, logprob in shown)
    facts = f"{_tokens(len(turn.ids))} of the answer; {escape(trained.said)}"
    if is_drawn:
        facts += (
            f"; log-probability {fmean(turn.logprobs):.3f} on average,"
            f" {min(turn.logprobs):.3f} at the least"
        )
    return _strip(f"tokens {trained.name}", facts, spans, len(turn.ids) - num_shown)


def prompt(turn: Turn, texts: Texts, num_shown: int) -> str:
    """The tokens that are new in a turn's prompt, collapsed; nothing if there are none."""
    if not turn.prompt_ids:
        return ""
    spans = "".join(_span(token, None, texts) for token in turn.prompt_ids[:num_shown])
    facts = f"{_tokens(len(turn.prompt_ids))} new in the prompt; context, never trained"
    return _strip("tokens context", facts, spans, len(turn.prompt_ids) - num_shown)


def legend() -> str:
    """What the colours and lines mean."""
    names = [f"{100 * probability:g} % or more" for probability in _LEAST]
    names.append(f"less than {100 * _LEAST[-1]:g} %")
    colours = " ".join(
        f"<span class=p{number}>{escape(name)}</span>" for number, name in enumerate(names)
    )
    return (
        '<div class="legend"><p>Tokens are coloured by the probability with which they were drawn:</p>'
        f'<p class="tokens">{colours}</p>'
        '<p class="tokens trained"><span>trained</span></p>'
        '<p class="tokens imitated"><span>trained by fine-tuning only</span></p>'
        '<p class="tokens untrained"><span>not trained</span></p>'
        '<p class="tokens context"><span>context, never trained</span></p></div>'
    )


def _shares(wanted: Iterable[int], left: int) -> list[int]:
    shares = []
    for num in wanted:
        shares.append(min(num, left))
        left -= shares[-1]
    return shares


def _span(token: int, logprob: float | None, texts: Texts) -> str:
    text = texts.get(token)
    shown = escape(text).replace("\n", "↵\n") if text else f"⟨{token}⟩"
    if logprob is None:
        return f'<span title="{token}">{shown}</span>'
    return f'<span class=p{_colour(logprob)} title="{token} {logprob:.4f}">{shown}</span>'


def _colour(logprob: float) -> int:
    """The number of the colour; what is no number has the last."""
    return next((number for number, edge in enumerate(_EDGES) if logprob >= edge), len(_EDGES))


def _strip(name: str, facts: str, spans: str, num_left: int) -> str:
    note = ""
    if num_left:
        note = f"<p>{_tokens(num_left)} left out: a page shows at most {MAX_TOKENS:,}.</p>"
    return (
        f'<details class="strip"><summary>{facts}</summary>'
        f'<div class="{name}">{spans}</div>{note}</details>'
    )


def _tokens(num: int) -> str:
    return f"{num:,} token{'' if num == 1 else 's'}"
