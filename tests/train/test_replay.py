"""With replay tokens go where they were sent before; all else is as without."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from katcore.errors import StageError
from katcore.inference.embedded import EmbeddedEngine
from katcore.schema.call import EngineRequest, Sampling
from katcore.schema.sample import Sample
from katcore.study.sorting import sorting
from katcore.train.batch import collate
from katcore.train.engine import Engine
from katcore.train.layout import Layout, packed, padded
from katcore.train.moe import engine_copy, new_moe
from katcore.train.objective import Sft
from katcore.train.policy import hidden
from katcore.train.prepare import recompute
from katcore.train.replay import NONE, Recorder, Routes, following, routers
from katcore.train.trainer import Schedule, Trainer
from tests.train.architectures import tiny
from tests.train.trees import gradients, line, sample, small_model

NAMES = ("qwen3-moe", "mixtral")
TREE = sample(
    [3, 5, 7, 11, 2, 13, 17, 4, 6],
    [-1, 0, 1, 2, 1, 4, 5, 4, 7],
    [False, True, True, True, True, False, True, True, True],
)
LINE = line([8, 9, 10, 1], [False, True, True, True], rollout_id="line")


@contextmanager
def choices(model: Any) -> Iterator[list[Tensor]]:
    """The experts that are computed in the passes inside, by layer."""
    seen: list[Tensor] = []

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[1])

    handles = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if type(module).__name__.endswith("Experts")
    ]
    yield seen
    for handle in handles:
        handle.remove()


def routes_of(model: Any, samples: list[Sample]) -> Routes:
    """What the routers of a model choose for each token of each sample."""
    found = {}
    for one in samples:
        batch = collate([one], layout=padded)
        with torch.no_grad(), choices(model) as seen:
            hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT)
        found[one.rollout_id] = torch.stack(seen, 1).to(torch.int16)
    return found


def loss_and_gradient(
    model: Any, samples: list[Sample], layout: Layout, routes: Routes | None
) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = Engine(model, layout=layout, routes=routes).backward(samples, Sft(), 1.0)
    return loss, gradients(model)


def shaken(name: str) -> Any:
    """The same model, whose first router has other weights."""
    model = tiny(name)
    with torch.no_grad():
        routers(model)[0].weight.add_(torch.randn_like(routers(model)[0].weight))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [padded, packed])
def test_its_own_choice_replayed_changes_nothing(name: str, layout: Layout) -> None:
    model = tiny(name)
    samples = [TREE, LINE]
    loss, gradient = loss_and_gradient(model, samples, layout, None)
    own = loss_and_gradient(model, samples, layout, routes_of(model, samples))
    assert own[0] == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(own[1], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_those_that_another_router_chose(name: str) -> None:
    model, other = tiny(name), shaken(name)
    routes = routes_of(other, [TREE])
    own = routes_of(model, [TREE])["r"]
    assert [bool((routes["r"][:, at] != own[:, at]).any()) for at in (0, 1)] == [True, True]
    batch = collate([TREE], layout=padded, routes=routes)
    with choices(model) as seen:
        hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT, routes_PLK=batch.routes_PLK)
    assert torch.equal(torch.stack(seen, 1), routes["r"].long())
    with choices(model) as after:
        hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT)
    assert torch.equal(torch.stack(after, 1), own.long())


def test_the_other_model_is_met_where_only_its_choice_differs() -> None:
    """Routers that choose otherwise and weigh alike: then replay makes up for all of the difference."""
    model, other = tiny("qwen3-moe"), tiny("qwen3-moe")
    routers(other)[0].register_forward_hook(_next_experts)
    samples = [TREE, LINE]
    wanted = loss_and_gradient(other, samples, padded, None)
    found = loss_and_gradient(model, samples, padded, routes_of(other, samples))
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-10, atol=1e-12)
    assert loss_and_gradient(model, samples, padded, None)[0] != pytest.approx(wanted[0], rel=1e-3)


def _next_experts(
    _router: Any, _given: Any, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    logits, _, chosen = output
    moved = (chosen + 1) % logits.shape[-1]
    weights = logits.softmax(-1).gather(1, moved)
    return logits, weights / weights.sum(-1, keepdim=True), moved


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_router_through_the_weights_of_what_was_chosen(name: str) -> None:
    model = tiny(name)
    routes = routes_of(shaken(name), [TREE])
    weight = routers(model)[0].weight
    loss_and_gradient(model, [TREE], padded, routes)
    direction = torch.randn_like(weight)
    slope = float((weight.grad * direction).sum())
    losses = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
        losses.append(loss_and_gradient(model, [TREE], padded, routes)[0])
        with torch.no_grad():
            weight.sub_(step * direction)
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-6)
    assert abs(slope) > 1e-3


@pytest.mark.parametrize("balance", [0.0, 1e-30])
def test_a_tree_in_parts_follows_the_same_routes(balance: float) -> None:
    """With or without a pass beforehand for the whole loss, which `balance` asks for."""
    model = tiny("qwen3-moe")
    routes = routes_of(shaken("qwen3-moe"), [TREE])
    wanted = loss_and_gradient(model, [TREE], packed, routes)
    model.zero_grad()
    engine = Engine(model, layout=packed, balance=balance, routes=routes)
    loss = engine.backward_in_parts(TREE, Sft(), 1.0, 4)
    assert loss == pytest.approx(wanted[0], rel=1e-12)
    torch.testing.assert_close(gradients(model), wanted[1], rtol=1e-10, atol=1e-12)


def test_a_token_without_a_record_chooses_for_itself() -> None:
    model, other = tiny("qwen3-moe"), shaken("qwen3-moe")
    own, routes = routes_of(model, [LINE])["line"], routes_of(other, [LINE])["line"]
    assert bool((routes[:2, 0] != own[:2, 0]).any())
    batch = collate([LINE], routes={"line": routes[:2]})
    assert batch.routes_PLK is not None
    assert bool((batch.routes_PLK[2:] == NONE).all())
    with choices(model) as seen:
        hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT, routes_PLK=batch.routes_PLK)
    assert torch.equal(seen[0], torch.cat([routes[:2, 0], own[2:, 0]]).long())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_routers_of_transformers_weigh_as_we_do(precision: str) -> None:
    """To the bit: their own choice replayed gives what they give."""
    model = engine_copy(small_moe(), is_bfloat16=precision == "bfloat16", jitter=0.0, seed=0)
    batch = collate([LINE], routes=routes_of(model, [LINE]))
    given = (model, batch.ids_BT, batch.positions_BT, batch.mask_BTT)
    replayed = hidden(*given, routes_PLK=batch.routes_PLK).last_hidden_state
    assert torch.equal(replayed, hidden(*given).last_hidden_state)


def small_moe() -> Any:
    chat = sorting(3).chat
    return new_moe(vocabulary=chat.vocabulary, end_id=chat.end_id, seed=0)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
async def test_an_engine_records_what_its_routers_chose(jitter: float) -> None:
    """Over two turns of several sessions at once: the second finds the first in the cache."""
    task, model = sorting(3), small_moe()
    sampler = engine_copy(model, is_bfloat16=False, jitter=jitter, seed=0)
    recorder = Recorder(sampler, num_slots=2, context=64)
    engine = EmbeddedEngine(sampler, task.chat, num_slots=2, context=64, recording=recorder)
    made: dict[str, tuple[int, ...]] = {"a": (5, 6, 7), "b": (9, 8)}
    for _ in range(2):
        for name, ids in made.items():
            answer = await engine.generate(EngineRequest(name, ids, Sampling(1.0, 6)))
            made[name] = ids + answer.ids
    routes = recorder.take()
    assert recorder.take() == {}
    samples = [
        line(list(ids), [False] + [True] * (len(ids) - 1), rollout_id=name)
        for name, ids in made.items()
    ]
    own = routes_of(model, samples)
    same = []
    for one in samples:
        found = routes[one.rollout_id]
        # The last token was drawn, and never read.
        assert found.shape == (len(one.tokens) - 1, 3, 2)
        same.append(bool((found.sort(-1).values == own[one.rollout_id][:-1].sort(-1).values).all()))
    assert same == [not jitter, not jitter]
    logprobs = {}
    trainer = Trainer(model, Schedule(0.0, 1))
    for replayed in (routes, None):
        trainer.replay(replayed)
        logprobs[replayed is None] = trainer.logprobs(samples)
    assert (logprobs[True] == logprobs[False]) == (not jitter)


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(StageError, match="has no router whose choice could be replayed"):
        routers(small_model())
    model = tiny("qwen3-moe")
    routes = collate([LINE], routes=routes_of(model, [LINE])).routes_PLK
    assert routes is not None
    routers(model)[1].register_forward_hook(_by_sigmoid)
    with pytest.raises(StageError, match="does not weigh experts by the softmax"):
        _pass(model, lambda: following(model, routes))
    with pytest.raises(StageError, match="r: no routes to replay"):
        collate([TREE], routes={"line": torch.zeros(1, 2, 2)})
    model = tiny("qwen3-moe")
    recompute(model)
    with pytest.raises(StageError, match=r"set scale\.recompute: false"):
        _pass(model, lambda: following(model, routes))


def _pass(model: Any, inside: Callable[[], Any]) -> None:
    batch = collate([LINE])
    with inside():
        hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT)


def _by_sigmoid(
    _router: Any, _given: Any, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    logits, _, chosen = output
    return logits, logits.sigmoid().gather(1, chosen), chosen


def test_branches_cannot_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3-moe")
    # Models of a name share their configuration.
    monkeypatch.setattr(model.config, "sliding_window", 4)
    trainer = Trainer(model, Schedule(0.0, 1))
    trainer.replay(None)
    with pytest.raises(StageError, match="trained on branches"):
        trainer.replay({"r": torch.zeros(1, 2, 2)})
