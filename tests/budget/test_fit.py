"""What fits, by how much it does not, and what would."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from katcore.budget.card import CARDS, GIB, find_card
from katcore.budget.fit import conversations_at_once, excesses, merged, smallest_changes
from katcore.budget.memory import Need, cache_bytes, reserve, rollout_parts, update_parts
from katcore.budget.shape import known_models, shape_of
from katcore.budget.step import Step, seconds
from katcore.errors import ConfigError
from katcore.serving import ServeSettings
from katcore.settings import LoraSettings, ScaleSettings

NAME = "Qwen/Qwen2.5-Coder-7B-Instruct"
SHAPE = shape_of(known_models()[NAME], NAME)
VLLM = {"engine": "vllm", "options": {"arguments": ["--gpu-memory-utilization", "0.5"]}}


def need(
    scale: dict[str, Any],
    serve: dict[str, Any] | None = None,
    *,
    lora: LoraSettings | None = None,
    tokens: int = 8192,
) -> Need:
    return Need(
        SHAPE,
        ScaleSettings.model_validate({"precision": "bfloat16"} | scale),
        lora,
        tokens,
        tokens,
        serve=ServeSettings.model_validate(serve) if serve else None,
        conversations=4,
    )


def needs() -> Iterator[tuple[Need, Need]]:
    """Pairs of which the second needs no more."""
    eight = {"processes": 8}
    for zero in (0, 2):
        more, less = {"zero": zero, **eight}, {"zero": zero + 1, **eight}
        yield need(more | {"recompute": True}), need(less | {"recompute": True})
    yield need(eight), need(eight | {"recompute": True})
    yield need({"zero": 2, **eight}), need({"zero": 2, **eight, "offload": "optimizer"})
    for more, less in (("none", "optimizer"), ("optimizer", "all")):
        yield (
            need({"zero": 3, **eight, "offload": more}),
            need({"zero": 3, **eight, "offload": less}),
        )
    yield need({}), need({}, lora=LoraSettings())
    yield need({}, tokens=16384), need({}, tokens=8192)


@pytest.mark.parametrize("pair", list(needs()), ids=str)
def test_what_saves_memory_is_estimated_to(pair: tuple[Need, Need]) -> None:
    more, less = (sum(update_parts(one).values()) for one in pair)
    assert less < more


def test_it_fits_exactly_from_what_it_needs_on() -> None:
    asked = need({"zero": 3, "processes": 8})
    total = sum(update_parts(asked).values())
    memory = next(num for num in range(total, 2 * total, 1 << 20) if num - reserve(num) >= total)
    assert not list(excesses(asked, memory))
    (found,) = excesses(asked, memory - (2 << 20))
    assert (found.phase, found.largest) == ("update", "optimizer")
    assert 0 < found.over <= 2 << 20


def test_an_evaluation_has_its_engines_and_nothing_of_a_training() -> None:
    scale = {"zero": 3, "processes": 8}
    embedded, served = (
        replace(need(scale, serve), is_trained=False)
        for serve in ({"replicas": 2}, VLLM | {"tensor_parallel": 4})
    )
    for asked in (embedded, served):
        assert not update_parts(asked)
        assert not asked.is_shared
    assert rollout_parts(embedded)["engine: weights"] == 4 * SHAPE.num_parameters
    assert rollout_parts(served)["engine: weights"] == 2 * SHAPE.num_parameters // 4
    assert not list(excesses(served, 80 * GIB))
    (found,) = excesses(embedded, 24 * GIB)
    assert (found.phase, found.largest) == ("rollouts", "engine: weights")


def test_servers_share_the_trainers_cards_or_have_their_own() -> None:
    scale = {"zero": 3, "processes": 8, "recompute": True}
    shared, apart = need(scale, VLLM), need(scale, VLLM | {"placement": "disaggregated"})
    assert set(rollout_parts(apart)) < set(rollout_parts(shared))
    memory = 80 * GIB
    assert not list(excesses(apart, memory))
    greedy = VLLM | {"options": {"arguments": ["--gpu-memory-utilization=0.95"]}}
    (found,) = excesses(need(scale, greedy), memory)
    assert (found.phase, found.largest) == ("rollouts", "engine's share")
    assert not list(excesses(need(scale, greedy | {"placement": "disaggregated"}), memory))


def test_engines_in_the_process_have_caches_and_copies_of_their_own() -> None:
    one = rollout_parts(need({}, {"engine": "embedded"}))
    two = rollout_parts(need({}, {"replicas": 2, "placement": "disaggregated"}))
    assert one["engine: cache"] == 4 * 8192 * SHAPE.kv_bytes(4)
    assert two["engine: cache"] == 2 * one["engine: cache"]
    assert (one["engine: weights"], two["engine: weights"]) == (0, 8 * SHAPE.num_parameters)
    scattered = rollout_parts(need({"zero": 3}, {"engine": "embedded"}))
    assert scattered["engine: weights"] == 4 * SHAPE.num_parameters


def test_a_share_that_is_none_is_an_error() -> None:
    for said in ([], ["much"], ["1.5"], ["0"]):
        arguments = ["--gpu-memory-utilization", *said]
        asked = need({}, {"engine": "vllm", "options": {"arguments": arguments}})
        with pytest.raises(ConfigError, match="is no share of a card; say for example"):
            list(excesses(asked, 80 * GIB))


def test_a_cache_has_room_for_whole_conversations() -> None:
    asked = need({}, VLLM | {"replicas": 2, "tensor_parallel": 2})
    memory, each = 80 * GIB, 8192 * SHAPE.kv_bytes() // 2
    free = 40 * GIB - SHAPE.num_parameters - 2 * GIB
    assert conversations_at_once(asked, memory) == 2 * (free // each)
    # Four key heads on eight GPUs: each of them is on two.
    wide = ServeSettings.model_validate(VLLM | {"tensor_parallel": 8})
    assert cache_bytes(SHAPE, wide) == SHAPE.kv_bytes() // 4


def test_a_step_takes_no_less_than_its_flops() -> None:
    card = CARDS["h100"]
    full, tuned = need({}), need({}, lora=LoraSettings())
    one = seconds(full, Step(10_000), card)
    rough = 6 * SHAPE.num_parameters * 10_000 / card.flops
    assert rough * 0.9 < one < rough * 1.3
    assert seconds(tuned, Step(10_000), card) == pytest.approx(one * 2 / 3)
    assert seconds(need({"recompute": True}), Step(10_000), card) == pytest.approx(one * 4 / 3)
    assert seconds(need({"zero": 3}), Step(10_000), card) == pytest.approx(one * 4 / 3)
    both = need({"zero": 3, "recompute": True})
    assert seconds(both, Step(10_000), card) == pytest.approx(one * 4 / 3)
    looked = Step(10_000, passes=2, looks=3)
    assert seconds(full, looked, card) == pytest.approx(one * (2 + 3 / 3))
    assert seconds(need({"processes": 8}), Step(20_000), card) == pytest.approx(one / 4)
    assert seconds(full, Step(10_000), find_card("80GiB")) == 0


def test_changes_that_say_two_things_are_no_set() -> None:
    two = ({"scale": {"zero": 2}}, {"scale": {"zero": 3}})
    assert merged(two) is None
    assert merged(({"a": 1}, {"a": 2})) is None
    assert merged((two[0], {"scale": {"recompute": True}}, {"a": 1})) == {
        "scale": {"zero": 2, "recompute": True},
        "a": 1,
    }


def test_the_smallest_sets_of_changes_are_found() -> None:
    changes = [{"one": 1}, {"two": 2}, {"three": 3}, {"never": 100}]

    def apply(change: Any) -> int | None:
        return None if "never" in change else sum(change.values())

    assert smallest_changes(changes, apply, lambda num: num >= 3) == [{"three": 3}]
    assert smallest_changes(changes, apply, lambda num: num >= 4) == [
        {"one": 1, "three": 3},
        {"two": 2, "three": 3},
    ]
    assert smallest_changes(changes, apply, lambda num: num >= 7) == []


def test_cards_have_names_or_sizes() -> None:
    assert find_card("h100") == CARDS["h100"]
    assert find_card("80GiB").memory == 80 * GIB
    assert find_card("1.5 gb").memory == 1_500_000_000
    with pytest.raises(ConfigError, match="no GPU 'H1000'; give its memory, such as 80GiB, or"):
        find_card("H1000")
