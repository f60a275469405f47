"""A tree in parts is the whole tree: loss, every gradient; and what is held at once is about one path."""

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from katcore.schema.sample import Sample
from katcore.train.batch import Weighting
from katcore.train.engine import Engine
from katcore.train.forest import depths, heavy_first, renumbered, subtree_sizes
from katcore.train.objective import Sft
from katcore.train.partition import Part, plan
from katcore.train.trainer import Schedule, Trainer
from tests.train.architectures import CONFIGS, tiny
from tests.train.naive import OBJECTIVES, objective_of, sampled, told_of
from tests.train.test_attention import relative
from tests.train.trees import gradients, sample, tree_samples

MODELS = {name: tiny(name) for name in CONFIGS}


def grown(num: int, forks: float, seed: int) -> list[int]:
    choose = random.Random(seed)
    parents = [-1]
    for token in range(1, num):
        path = [token - 1]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        parents.append(token - 1 if choose.random() > forks else choose.choice(path))
    return renumbered(parents, heavy_first(parents))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 150),
    st.sampled_from([0.02, 0.1, 0.3]),
    st.integers(0, 1000),
    st.integers(1, 120),
)
def test_parts_hold_about_one_path(num: int, forks: float, seed: int, max_tokens: int) -> None:
    parents = grown(num, forks, seed)
    whole = plan(parents, max_tokens)
    seen: list[int] = []

    def visit(part: Part) -> None:
        seen.extend(part.tokens)
        for below in part.parts:
            assert below.path == (path_of(parents, below.path[-1]) if below.path else [])
            lies_depth_first(below, parents)
            visit(below)

    visit(whole)
    assert sorted(seen) == list(range(num)), "each token is in one part"
    assert whole.num_held <= 1.3 * max(max_tokens, 1 + max(depths(parents)))


def lies_depth_first(part: Part, parents: list[int]) -> None:
    """Below each token are those that come after it, up to some place: what `flex` relies on."""
    place = {token: at for at, token in enumerate(part.path + part.tokens)}
    here = [place.get(parents[token], -1) for token in place]
    ends = [at + size for at, size in enumerate(subtree_sizes(here))]
    for query, token in enumerate(place):
        seen = {key for key in range(query + 1) if query < ends[key]}
        assert seen == {place[above] for above in path_of(parents, token)}


def path_of(parents: list[int], token: int) -> list[int]:
    path = [token]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def test_a_tree_that_fits_is_one_part() -> None:
    assert [part.tokens for part in plan([-1, 0, 1, 1, 0], 5).parts] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4, deadline=None)
@given(
    tree=tree_samples(),
    objective=st.sampled_from(OBJECTIVES),
    max_tokens=st.integers(1, 12),
    weighting=st.sampled_from(get_args(Weighting)),
    balance=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 100),
)
def test_parts_are_the_whole_tree(
    name: str,
    tree: Sample,
    objective: str,
    max_tokens: int,
    weighting: Weighting,
    balance: float,
    seed: int,
) -> None:
    if not any(tree.trained) or (objective == "sequence" and weighting == "once"):
        return
    is_mixture = name in ("qwen3-moe", "mixtral")
    engine = Engine(MODELS[name], weighting, balance=balance if is_mixture else 0.0)
    told = told_of(tree, seed, engine.model)
    tree = sampled(tree, told)
    loss_of = objective_of(objective, [tree], [told])
    engine.model.zero_grad()
    whole = engine.backward([tree], loss_of, 3.0)
    wanted = gradients(engine.model)
    engine.model.zero_grad()
    parts = engine.backward_in_parts(tree, loss_of, 3.0, max_tokens)
    assert parts == pytest.approx(whole, rel=1e-10, abs=1e-12)
    assert relative(gradients(engine.model), wanted) < 1e-10


def test_gradients_go_from_part_to_part() -> None:
    """Without the relay the equality fails: the loss below says nothing to the weights above."""
    tree = sample([1, 2, 3, 4, 5, 6], [-1, 0, 1, 1, 3, 2], [False] * 4 + [True] * 2)
    engine = Engine(MODELS["llama"])
    engine.model.zero_grad()
    engine.backward_in_parts(tree, Sft(), 1.0, 1)
    embedding = engine.model.get_input_embeddings().weight.grad
    assert embedding is not None
    assert float(embedding[1].abs().max()) > 1e-6, "the first token is only context"


def test_a_step_on_a_tree_over_the_limit_is_the_same_step() -> None:
    tree = sample([*range(1, 13)], [-1, *range(5), 3, *range(6, 9), 0, 10], [False, *[True] * 11])
    trees = [tree, replace(tree, rollout_id="r1")]

    def after(max_tokens: int) -> torch.Tensor:
        trainer = Trainer(tiny("qwen3"), Schedule(1e-2, 60, 5, 0.1), max_tokens=max_tokens)
        trainer.update(trees, Sft())
        trainer.update(trees, Sft())
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    torch.testing.assert_close(after(8192), after(6), rtol=1e-9, atol=1e-9)
