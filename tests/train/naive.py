"""Objectives written out: branch by branch, each run alone as a plain sequence, without what katcore has.

Where branches share a token or a turn, each of them has its own say, and each its own pass of the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train.batch import Weighting
from katcore.train.distill import Distillation, Divergence
from katcore.train.objective import Objective, Sft
from katcore.train.surrogate import Clipped, Correction, PolicyGradient
from tests.train.trees import VOCABULARY

SURROGATES = {
    "token": Clipped("token"),
    "turn": Clipped("turn", "rollout", temperature=0.8),
    "turn-geometric": Clipped("turn-geometric", "unit"),
    "sequence": Clipped("sequence", "rollout"),
    "token-terms": Clipped("token", "rollout", kl=0.3, entropy=0.1, imitation=0.2),
    "turn-terms": Clipped("turn", "unit", kl=0.3, entropy=0.1, imitation=0.2, temperature=0.8),
    "icepop": Clipped("turn", "rollout", correction=Correction("icepop", 0.7, 1.4)),
    "truncate": Clipped("turn-geometric", "rollout", correction=Correction("truncate", high=1.1)),
}
DIVERGENCES = {
    "reverse-kl": Divergence(),
    "top-k": Divergence("top-k", k=4),
    "policy-gradient": Divergence("policy-gradient", most=1.0, temperature=0.8),
    "likelihood": Divergence("likelihood"),
}
OBJECTIVES = ("sft", *SURROGATES, *DIVERGENCES)
Total = tuple[Tensor, float]
"""A loss, and what that of a step is divided by."""


@dataclass(frozen=True)
class Given:
    """What an objective is told of a tree, by its trained tokens but for `rows`: see `PolicyGradient`."""

    rows: tuple[tuple[float, ...], ...]
    old: list[float]
    apart: list[float]
    reference: list[float]
    taught: Tensor


def told_of(tree: Sample, seed: int, model: Any) -> Given:
    """Numbers near those that the model has, so that some ratios are clipped and some not."""
    draw = torch.Generator().manual_seed(seed)
    says: dict[int, float] = {}
    with torch.no_grad():
        for path, logits in _runs(model, tree):
            for token, logit in zip(path[1:], logits, strict=True):
                says[token] = float(logit.log_softmax(0)[tree.tokens[token]])
    own = torch.tensor([says[token] for token in _trained(tree)], dtype=torch.float64)
    old, apart, reference = own + 0.3 * torch.randn(3, len(own), generator=draw).double()
    shape = (len(_paths(tree)), 1 + max(_answers(tree).values()))
    rows = tuple(map(tuple, torch.randn(shape, generator=draw).tolist()))
    taught = torch.randn(len(own), VOCABULARY, dtype=torch.float64, generator=draw)
    return Given(rows, old.tolist(), (apart - own).tolist(), reference.tolist(), taught)


def sampled(tree: Sample, told: Given) -> Sample:
    """A tree that passed, but for its first answer, by a sampler that is the old policy."""
    old = iter(told.old)
    logprobs = tuple(next(old) if yes else 0.0 for yes in tree.trained)
    return replace(tree, logprobs=logprobs, reward=1.0, failed=(0,))


def objective_of(name: str, samples: Sequence[Sample], told: Sequence[Given]) -> Objective:
    """Katcore's own."""
    if name == "sft":
        return Sft()
    by_id = {tree.rollout_id: one for tree, one in zip(samples, told, strict=True)}
    if name in DIVERGENCES:
        return Distillation(
            lambda _, samples: torch.cat([by_id[tree.rollout_id].taught for tree in samples]),
            DIVERGENCES[name],
            advantages={key: one.rows[:1] for key, one in by_id.items()},
        )
    return surrogate(SURROGATES[name], samples, told)


def surrogate(shape: Clipped, samples: Sequence[Sample], told: Sequence[Given]) -> PolicyGradient:
    by_id = {tree.rollout_id: one for tree, one in zip(samples, told, strict=True)}
    return PolicyGradient(
        {key: one.rows for key, one in by_id.items()},
        shape,
        old={key: one.old for key, one in by_id.items()},
        apart={key: one.apart for key, one in by_id.items()},
        reference=lambda _, samples: torch.cat(
            [
                torch.tensor(by_id[tree.rollout_id].reference, dtype=torch.float64)
                for tree in samples
            ]
        ),
    )


def written_out(
    name: str, model: Any, samples: Sequence[Sample], told: Sequence[Given], weighting: Weighting
) -> Total:
    """The same, of all samples."""
    loss, weight = torch.zeros((), dtype=torch.float64), 0.0
    for tree, one in zip(samples, told, strict=True):
        if name in SURROGATES:
            own, part = surrogate_written_out(SURROGATES[name], model, tree, one, weighting)
        else:
            own, part = _token_mean(name, model, tree, one, weighting)
        loss, weight = loss + own, weight + part
    return loss, weight


def _token_mean(name: str, model: Any, tree: Sample, told: Given, weighting: Weighting) -> Total:
    said = {token: number for number, token in enumerate(_trained(tree))}
    loss, weight = torch.zeros((), dtype=torch.float64), 0.0
    for path, logits in _runs(model, tree):
        for token, logit in zip(path[1:], logits, strict=True):
            if token in said:
                share = _share(tree, token, weighting)
                loss = loss + share * _cost(name, logit, tree, token, said[token], told)
                weight += share
    return loss, weight


def _cost(name: str, logit: Tensor, tree: Sample, token: int, number: int, told: Given) -> Tensor:
    said = tree.tokens[token]
    if name in ("sft", "likelihood"):
        return -logit.log_softmax(0)[said]
    shape = DIVERGENCES[name]
    heat = shape.temperature
    p, q = (logit / heat).log_softmax(0), (told.taught[number] / heat).log_softmax(0)
    if name == "policy-gradient":
        difference = max(-shape.most, min(shape.most, float((q[said] - p[said]).detach())))
        gain = told.rows[0][_answers(tree)[token]] + shape.strength * difference
        ratio = (p[said] - tree.logprobs[token]).exp()
        return -_least(ratio, gain, shape.clip_low, shape.clip_high)
    if name == "reverse-kl":
        return sum((p[v].exp() * (p[v] - q[v]) for v in range(VOCABULARY)), torch.zeros(()))
    likely = sorted(range(VOCABULARY), key=lambda v: -float(q[v]))[: shape.k]
    inside = sum((p[v].exp() * (p[v] - q[v]) for v in likely), torch.zeros(()))
    rest_p, rest_q = (1 - sum(x[v].exp() for v in likely) for x in (p, q))
    return inside + rest_p * (rest_p / rest_q).log()


def surrogate_written_out(
    shape: Clipped, model: Any, tree: Sample, told: Given, weighting: Weighting
) -> Total:
    """Of one tree."""
    number = {token: number for number, token in enumerate(_trained(tree))}
    held = [_units(shape, tree, path) for path in _paths(tree)]
    num_all = len({unit for units in held for unit in units})
    loss, num_units = torch.zeros((), dtype=torch.float64), 0.0
    for (path, logits), units, row in zip(_runs(model, tree), held, told.rows, strict=True):
        scores = dict(zip(path[1:], logits / shape.temperature, strict=True))
        logprob = {
            token: score.log_softmax(0)[tree.tokens[token]] for token, score in scores.items()
        }
        num_here = num_all if weighting == "once" else len(units)
        num_tokens = len(number) if weighting == "once" else sum(map(len, units))
        for unit in units:
            share = _share(tree, unit[-1], weighting)
            num_units += share
            if shape.mean == "rollout":
                share /= num_here
            turns = {_answers(tree)[token] for token in unit}
            advantage = sum(row[turn] for turn in turns) / len(turns)
            loss = loss - share * _gain(shape, unit, logprob, advantage, told, number)
            for token in unit:
                p = scores[token].softmax(0)
                apart = told.reference[number[token]] - logprob[token]
                is_good = tree.reward == 1.0 and _answers(tree)[token] not in tree.failed
                cost = shape.kl * (apart.exp() - apart - 1) + shape.entropy * (p * p.log()).sum()
                cost = cost - shape.imitation * is_good * logprob[token]
                loss = loss + share * num_here / num_tokens * cost
    is_whole = shape.mean == "rollout" or shape.level == "sequence"
    return loss, 1.0 if is_whole else num_units


def _gain(
    shape: Clipped,
    unit: Sequence[int],
    logprob: dict[int, Tensor],
    advantage: float,
    told: Given,
    number: dict[int, int],
) -> Tensor:
    fix = shape.correction
    apart = {token: torch.tensor(told.apart[number[token]], dtype=torch.float64) for token in unit}
    kept = list(unit)
    if fix and fix.kind == "icepop":
        kept = [token for token in unit if fix.low <= float(apart[token].exp()) <= fix.high]
    if not kept:
        return torch.zeros((), dtype=torch.float64)
    length = 1 if shape.level == "turn" else len(kept)
    moved = sum(logprob[token] - told.old[number[token]] for token in kept)
    ratio = torch.as_tensor(moved / length).exp()
    gain = _least(ratio, advantage, shape.clip_low, shape.clip_high)
    if fix:
        off = torch.as_tensor(sum(apart[token] for token in kept) / length)
        gain = gain * min(fix.high, float(off.exp()))
    return gain


def _least(ratio: Tensor, gain: float, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)


def _units(shape: Clipped, tree: Sample, path: list[int]) -> list[tuple[int, ...]]:
    """What of a branch is clipped as one; answers that it has the whole of, where these are."""
    trained = [token for token in path if tree.trained[token]]
    if shape.level == "token":
        return [(token,) for token in trained]
    if shape.level == "sequence":
        return [tuple(trained)] if trained else []
    of = _answers(tree)
    answers = [
        tuple(token for token in of if of[token] == turn) for turn in dict.fromkeys(of.values())
    ]
    return [answer for answer in answers if set(answer) <= set(path)]


def _share(tree: Sample, token: int, weighting: Weighting) -> float:
    """What a branch adds for a token or unit: 1 / K, or as much of one as it has branches."""
    paths = _paths(tree)
    through = sum(token in path for path in paths)
    return 1 / len(paths) if weighting == "path" else 1 / through


@cache
def _answers(tree: Sample) -> dict[int, int]:
    """The answer of each trained token: a fork in the middle of one begins another."""
    of: dict[int, int] = {}
    for token in _trained(tree):
        goes_on = token - 1 in of and tree.parents[token] == token - 1
        of[token] = of[token - 1] if goes_on else 1 + max(of.values(), default=-1)
    return of


def _trained(tree: Sample) -> list[int]:
    return [token for token, yes in enumerate(tree.trained) if yes]


@cache
def _paths(tree: Sample) -> list[list[int]]:
    found = []
    for leaf in range(len(tree.parents)):
        if leaf not in tree.parents:
            path = [leaf]
            while tree.parents[path[0]] >= 0:
                path.insert(0, tree.parents[path[0]])
            found.append(path)
    return found


def _runs(model: Any, tree: Sample) -> Iterator[tuple[list[int], Tensor]]:
    """Each branch, and the logits of its tokens but the first."""
    for path in _paths(tree):
        logits = model(torch.tensor([[tree.tokens[token] for token in path]])).logits[0]
        yield path, logits[:-1]
