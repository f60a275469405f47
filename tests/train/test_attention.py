"""In each layout and architecture, a tree has the loss and the gradients of its branches run alone."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from katcore.schema.sample import Sample
from katcore.train import attention, flex
from katcore.train.attention import apart, cut
from katcore.train.batch import TreeBatch, Weighting, collate
from katcore.train.forest import branches, heavy_first, pieces, renumbered
from katcore.train.layout import Rows, ancestors, packed, padded, unrolled
from katcore.train.policy import logits_at
from tests.train.architectures import CONFIGS, tiny
from tests.train.naive import OBJECTIVES, objective_of, sampled, told_of, written_out
from tests.train.trees import gradients, sample, tree_samples

LAYOUTS: dict[str, Callable[[Sequence[Sample]], Rows]] = {
    "padded": padded,
    "packed": packed,
    "unrolled": unrolled,
}
MODELS = {name: tiny(name) for name in CONFIGS}


def several(trees: list[Sample]) -> list[Sample]:
    return [
        replace(tree, rollout_id=f"r{at}") for at, tree in enumerate(trees) if any(tree.trained)
    ]


FORESTS = st.lists(tree_samples(), min_size=1, max_size=2).map(several)


def logits_of_branches(model: Any, samples: list[Sample]) -> Tensor:
    """Each branch by itself through the whole model; a token of several has the mean of its logits there."""
    found = []
    for tree in samples:
        sums: dict[int, list[Tensor]] = {}
        for path in branches(tree.parents):
            logits = model(torch.tensor([[tree.tokens[token] for token in path]])).logits[0]
            for before, token in zip(range(len(path)), path[1:], strict=False):
                sums.setdefault(token, []).append(logits[before])
        found += [torch.stack(sums[token]).mean(0) for token, yes in enumerate(tree.trained) if yes]
    return torch.stack(found)


def logits_of(model: Any, batch: TreeBatch) -> Tensor:
    return logits_at(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT, batch.at_N)


def relative(one: Tensor, other: Tensor) -> float:
    """The largest difference beside the largest value; below 1e-5 that is rounding of zero."""
    return float((one - other).detach().abs().max() / other.detach().abs().max().clamp(min=1e-5))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8, deadline=None)
@given(
    samples=FORESTS,
    layout=st.sampled_from(sorted(LAYOUTS)),
    objective=st.sampled_from(OBJECTIVES),
    weighting=st.sampled_from(get_args(Weighting)),
    seed=st.integers(0, 1000),
)
def test_a_tree_is_its_branches(
    name: str,
    samples: list[Sample],
    layout: str,
    objective: str,
    weighting: Weighting,
    seed: int,
) -> None:
    if not samples or (objective == "sequence" and weighting == "once"):
        return
    model = MODELS[name]
    told = [told_of(tree, seed + at, model) for at, tree in enumerate(samples)]
    samples = [sampled(tree, one) for tree, one in zip(samples, told, strict=True)]
    loss_of = objective_of(objective, samples, told)
    batch = collate(samples, weighting, LAYOUTS[layout])
    model.zero_grad()
    whole = loss_of(logits_of(model, batch), batch, samples)
    whole.backward()
    found = gradients(model)
    model.zero_grad()
    single, weight = written_out(objective, model, samples, told, weighting)
    single.backward()
    assert relative(whole, single) < 1e-10
    assert relative(found, gradients(model)) < 1e-10
    assert loss_of.weight(samples, weighting) == pytest.approx(weight, rel=1e-12)


def test_a_wrong_piece_is_noticed() -> None:
    """The equality above can fail: it does when one token sees one token too many."""
    tree = sample([1, 2, 3, 4, 5, 6], [-1, 0, 1, 1, 3, 2], [False, *[True] * 5])
    batch = collate([tree], layout=packed)
    order = heavy_first(tree.parents)
    parents = renumbered(tree.parents, order)
    parents[order.index(3)] = order.index(2)
    wrong = replace(batch, mask_BTT=attention.TreeMask(parents))
    right = logits_of_branches(MODELS["llama"], [tree])
    assert relative(logits_of(MODELS["llama"], batch), right) < 1e-12
    assert relative(logits_of(MODELS["llama"], wrong), right) > 1e-3


@settings(max_examples=30, deadline=None)
@given(tree_samples(), st.integers(1, 5), st.integers(0, 100))
def test_pieces_are_the_ancestor_relation(tree: Sample, block: int, seed: int) -> None:
    """Also where the tree grows out of tokens that are not there themselves."""
    choose = random.Random(seed)
    num_past = choose.randint(0, 6)
    own = renumbered(tree.parents, heavy_first(tree.parents))
    root = choose.randint(0, num_past) - 1
    grown = [*range(-1, num_past - 1), *(num_past + at if at >= 0 else root for at in own)]
    parts = pieces(grown, num_past)
    wanted = ancestors(grown)[num_past:].int()
    borders = sorted({choose.randint(1, 6) for _ in range(2)} & set(range(num_past)))
    for found in (parts, cut(parts, block), list(apart(cut(parts, block), borders))):
        seen = torch.zeros_like(wanted)
        for start, end, first, last, is_causal in found:
            ones = torch.ones(end - start, last - first, dtype=torch.int)
            seen[start:end, first:last] += ones.tril() if is_causal else ones
        assert torch.equal(seen, wanted)
        assert sum(part.num_pairs for part in found) == int(wanted.sum())
    assert not any(piece.first < border < piece.last for piece in found for border in borders)


@settings(max_examples=20, deadline=None)
@given(tree_samples(), st.integers(1, 9), st.integers(0, 20))
def test_cut_pieces_give_the_dense_result(tree: Sample, block: int, border: int) -> None:
    """Also with keys and values in two stretches."""
    parents = renumbered(tree.parents, heavy_first(tree.parents))
    torch.manual_seed(len(parents))
    shape = (1, len(parents), 4, 8)
    query, grad = torch.randn(2, *shape, dtype=torch.float64).transpose(2, 3).unbind()
    key, value = torch.randn(2, 1, 2, len(parents), 8, dtype=torch.float64).unbind()
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    blocks = cut(pieces(parents), block)
    # A causal piece lies in one stretch: the border is before it or behind.
    border = max([0, *(p.first for p in blocks if p.is_causal and p.first <= border)])
    stretches = [
        stretch for tensor in (key, value) for stretch in tensor.tensor_split([border], dim=2)
    ]
    placed = tuple(apart(blocks, [border]))
    found = attention._TreeAttention.apply(placed, 0.3, query, *stretches)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=ancestors(parents), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(dense, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_past", [0, 3])
def test_flex_attention_gives_the_dense_result(
    num_past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it runs without a GPU: uncompiled. More than one block of 128.

    Backwards, too: torch refuses that without a GPU, for what it would compile; uncompiled it has it.
    """
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    past = list(range(-1, num_past - 1))
    chain = [num_past + at for at in range(-1, 89)]
    own = [*chain, num_past + 40, *range(num_past + 90, num_past + 139), num_past + 10]
    parents = [*past, *own]
    torch.manual_seed(0)
    query, grad = torch.randn(2, 1, 4, len(own), 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, len(parents), 8, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (query, key.clone(), value.clone())]
    above: Any = SimpleNamespace(lengths=[num_past])
    mask = attention.TreeMask(parents, above).blocks(torch.device("cpu"))
    found = flex.attend(*inputs, mask, 0.3)
    seen = ancestors(parents)[num_past:]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=seen, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(dense, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_largest_subtree_comes_first() -> None:
    #  0 -> 1 -> 2, and 1 -> 3 -> 4, and 0 -> 5
    assert heavy_first([-1, 0, 1, 1, 3, 0]) == [0, 1, 3, 4, 2, 5]
