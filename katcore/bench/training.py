"""`kat bench tree`: a step on a token tree beside the same step on its branches, and the bound of it.

Each tree is run in four ways, in turn: as a run does it (whole, up to so many tokens), in small parts, its
branches packed end to end, and its branches padded. All have the same loss, which is checked.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import isclose
from statistics import geometric_mean, median
from typing import Any

from katcore.bench.aim import Aim
from katcore.bench.disk import machine
from katcore.bench.recorded import scaled, sessions
from katcore.bench.shapes import SHAPES, apart, tree
from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train.measure import (
    Steps,
    Way,
    as_tree,
    in_packed,
    in_padded,
    in_parts,
    lines,
    model_settings,
)

POR = (0.0, 0.3, 0.5, 0.7, 0.846, 0.9)
_LONGER = {"opencode": 5, "openclaw": 2}
"""Recorded sessions that may be there once more, so many times as large."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How many tokens a tree has, how often each way is timed, the model, and whether larger trees follow.

    `max_tokens` bounds what is computed at once, as `micro_batch_tokens` does in a run.
    """

    tokens: int = 2048
    rounds: int = 5
    hidden: int = 320
    layers: int = 8
    has_larger: bool = False
    max_tokens: int = 8192

    @property
    def num_parts(self) -> int:
        """How many times a progress bar moves."""
        num_longer = len(_LONGER) if self.has_larger else 0
        return 1 + len(SHAPES) * (len(POR) - 1) + len(sessions()) + num_longer


@dataclass(frozen=True, slots=True)
class Row:
    """A tree beside its packed branches. Ratios say how many times less the tree takes.

    `speedup_padded` and `mem_ratio_padded` are beside padded branches. `parts_speedup` and `parts_ratio` are
    of the tree in parts: its speed beside packed branches, and what it holds over what its longest branch
    alone does.
    """

    shape: str
    tokens_flat: int
    tokens_tree: int
    por: float
    tree_s: float
    speedup: float
    token_bound: float
    flop_bound: float
    bound_fraction: float
    mem_ratio: float
    speedup_padded: float
    mem_ratio_padded: float
    parts_speedup: float
    parts_ratio: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    machine: str
    model: str
    rows: list[Row]
    aims: list[Aim]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def run(settings: Settings, step: Callable[[str], None]) -> Report:
    """Measure; `step` is told each part."""
    model = model_settings(settings.hidden, settings.layers, settings.tokens)
    steps = Steps(model)
    rows = []
    for shape, sample in _trees(settings, model.vocabulary):
        step(shape)
        rows.append(_row(steps, shape, sample, settings))
    size = sum(p.numel() for p in steps.model.parameters()) / 1e6
    return Report(machine() + ", one thread", f"{size:.1f} M parameters", rows, _aims(rows))


def _trees(settings: Settings, vocabulary: int) -> Iterator[tuple[str, Sample]]:
    num = settings.tokens
    yield "apart", tree(apart(num), vocabulary, seed=0)
    for shape, parents in SHAPES.items():
        for por in POR[1:]:
            yield shape, tree(parents(num, por), vocabulary, seed=0)
    found = {name.split()[0]: session for name, session in sessions().items()}
    sizes = [(name, name, 1) for name in found]
    if settings.has_larger:
        sizes += [(f"{name}, long", name, times) for name, times in _LONGER.items()]
    for shape, name, times in sizes:
        above, trained = scaled(found[name], times * num)
        yield shape, tree(above, vocabulary, seed=0, trained=trained)


def _row(steps: Steps, shape: str, sample: Sample, settings: Settings) -> Row:
    ways = {
        "tree": as_tree(sample, settings.max_tokens),
        "parts": in_parts(sample),
        "packed": _packed(steps, sample, settings),
        "padded": in_padded(sample, settings.max_tokens),
    }
    held = {name: steps.held_mib(way) for name, way in ways.items()}
    longest = steps.held_mib(as_tree(lines(sample)[-1]))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    losses = dict.fromkeys(ways, 0.0)
    for number in range(settings.rounds):
        for name in list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]:
            seconds, losses[name] = steps.timed(ways[name])
            taken[name].append(seconds)
    if not all(isclose(loss, losses["packed"], rel_tol=1e-3) for loss in losses.values()):
        raise StageError(f"{shape}: the ways to do a step disagree about its loss: {losses}")
    median_s = {name: median(values) for name, values in taken.items()}
    flat = sum(len(line.tokens) for line in lines(sample))
    flop_bound = steps.flops(ways["packed"]) / steps.flops(ways["tree"])
    speedup = median_s["packed"] / median_s["tree"]
    return Row(
        shape,
        flat,
        len(sample.tokens),
        1 - len(sample.tokens) / flat,
        median_s["tree"],
        speedup,
        flat / len(sample.tokens),
        flop_bound,
        speedup / flop_bound,
        held["packed"] / held["tree"],
        median_s["padded"] / median_s["tree"],
        held["padded"] / held["tree"],
        median_s["packed"] / median_s["parts"],
        held["parts"] / longest,
    )


def _packed(steps: Steps, sample: Sample, settings: Settings) -> Way:
    """In passes as large as a tree, or as large as they may be: what is faster, of one step each."""
    found = [in_packed(sample, most) for most in (settings.tokens, settings.max_tokens)]
    steps.loss(found[0])  # the first one that is computed is slower
    return min(found, key=lambda way: steps.timed(way)[0])


def _aims(rows: list[Row]) -> list[Aim]:
    shared = [row.bound_fraction for row in rows if row.por >= 0.49]
    apart = [row.speedup for row in rows if not row.por]
    return [
        Aim.at_least(
            "of the flop bound, POR from 0.5 on, geometric mean", geometric_mean(shared), 0.95
        ),
        Aim.at_least("of the flop bound, in each of those", min(shared), 0.9),
        Aim.at_least("speed beside packed branches that share nothing", min(apart), 0.97),
        Aim.at_most(
            "held in parts, over the longest branch", max(row.parts_ratio for row in rows), 1.3
        ),
    ]
