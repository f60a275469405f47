"""Activations computed again change nothing, and are fewer; bfloat16 changes little."""

import copy
from typing import Any

import pytest
import torch

from katcore.train.engine import Engine
from katcore.train.measure import _Held
from katcore.train.objective import Sft
from katcore.train.precision import compute_in_bfloat16
from katcore.train.prepare import recompute
from tests.train.architectures import tiny
from tests.train.trees import gradients, sample

TREE = sample(
    list(range(1, 21)),
    [-1, *range(9), 3, *range(10, 19)],
    [False, *[True] * 19],
)


def stepped(model: Any, max_tokens: int = 0) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    engine = Engine(model)
    if max_tokens:
        loss = engine.backward_in_parts(TREE, Sft(), 1.0, max_tokens)
    else:
        loss = engine.backward([TREE], Sft(), 1.0)
    return loss, gradients(model)


@pytest.mark.parametrize("max_tokens", [0, 12])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_computing_again_changes_nothing(name: str, max_tokens: int) -> None:
    model = tiny(name)
    first = copy.deepcopy(model)
    recompute(first)
    again = copy.deepcopy(first)
    for parameter in first.parameters():
        parameter.data.zero_()  # a copy computes with its own layers
    wanted, found = stepped(model, max_tokens), stepped(again, max_tokens)
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-10, atol=1e-12)


def test_computing_again_keeps_less() -> None:
    model = tiny("llama")

    def held() -> int:
        kept = _Held(p.untyped_storage().data_ptr() for p in model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda box: box.tensor):
            stepped(model)
        return kept.peak

    before = held()
    recompute(model)
    assert held() < before / 2


@pytest.mark.parametrize("max_tokens", [0, 12])
def test_bfloat16_is_near_and_leaves_weights_and_gradients_in_float32(max_tokens: int) -> None:
    model = tiny("llama").float()
    wanted, grads = stepped(model, max_tokens)
    compute_in_bfloat16(model)
    loss, found = stepped(model, max_tokens)
    assert loss != wanted
    assert loss == pytest.approx(wanted, rel=0.02)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, grads, dim=0) > 0.99
    assert {p.dtype for p in model.parameters()} == {torch.float32}
