"""The load-balancing loss of a tree is transformers' own loss of its branches."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from katcore.schema.sample import Sample
from katcore.train.balance import balance_loss, masses
from katcore.train.batch import collate
from katcore.train.layout import packed, padded, unrolled
from katcore.train.policy import hidden
from tests.train.architectures import tiny
from tests.train.test_attention import relative
from tests.train.trees import gradients, tree_samples

MODELS = {name: tiny(name) for name in ("qwen3-moe", "mixtral")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [padded, packed, unrolled])
@settings(max_examples=4, deadline=None)
@given(tree=tree_samples())
def test_it_is_the_loss_of_the_branches(name: str, layout: object, tree: Sample) -> None:
    model = MODELS[name]
    tree = replace(tree, trained=tuple(parent >= 0 for parent in tree.parents))
    found = {}
    for how in (layout, unrolled):
        batch = collate([tree], layout=how)  # type: ignore[arg-type]
        said = hidden(
            model, batch.ids_BT, batch.positions_BT, batch.mask_BTT, output_router_logits=True
        )
        model.zero_grad()
        loss = balance_loss(*masses(said.router_logits, batch.counts_P, 2))
        loss.backward()
        found[how] = (loss.detach(), gradients(model))
        if how is unrolled:
            theirs = load_balancing_loss_func(said.router_logits, 4, 2, batch.counts_P[None])
            assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert relative(found[layout][0], found[unrolled][0]) < 1e-10
    assert relative(found[layout][1], found[unrolled][1]) < 1e-10
