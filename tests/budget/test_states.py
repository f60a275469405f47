"""Weights, gradients and optimizer are those of torch, and of DeepSpeed's own estimators."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as of_stage_3
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as of_stage_2
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from katcore.budget.shape import Shape, known_models, shape_of
from katcore.budget.states import states
from katcore.settings import LoraSettings, OptimizerSettings, ScaleSettings
from katcore.train.layerwise import Layerwise
from katcore.train.lora import add_adapters
from katcore.train.precision import compute_in_bfloat16, narrow
from katcore.train.scattered import scatter
from tests.budget.test_activation import CONFIGS as FAMILIES
from tests.budget.test_activation import SHAPE
from tests.budget.test_shape import TINY

MODELS = [shape_of(config, name) for name, config in known_models().items()]
MOMENTS = ("exp_avg", "exp_avg_sq")
LAYOUTS = [(1, 1), (4, 1), (8, 1), (8, 4)]


def scale(**given: Any) -> ScaleSettings:
    return ScaleSettings.model_validate({"precision": "bfloat16"} | given)


def test_a_float32_model_has_the_bytes_that_torch_holds_after_a_step() -> None:
    config = TINY | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(12)[None]).logits.sum().backward()
    optimizer.step()
    found = states(shape_of(config, ""), ScaleSettings())
    parameters = list(model.parameters())
    assert found.weights == sum(one.nbytes for one in parameters)
    assert found.gradients == sum(one.grad.nbytes for one in parameters if one.grad is not None)
    moments = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    assert found.optimizer == sum(one.nbytes for one in moments)
    assert (found.copies, found.gathered, found.buckets, found.host) == (0, 0, 0, 0)
    assert found.frozen == found.weights


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_model_in_bfloat16_has_the_bytes_that_it_is_held_in(name: str, zero: int) -> None:
    config = SHAPE | FAMILIES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).requires_grad_(False)
    narrow(model)
    shards = scatter(model, ScaleSettings(zero=3)).shards if zero else []
    found = states(shape_of(config, ""), scale(zero=zero)).frozen
    assert found == _bytes([*shards, *model.parameters()])


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_adapters_are_those_of_the_linear_layers(targets: Any) -> None:
    config = TINY | {"model_type": "qwen2", "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
        if targets == "all-linear" or name.rpartition(".")[2] in targets
    ]
    expected = sum(5 * (one.in_features + one.out_features) for one in layers)
    assert shape_of(config, "").adapters(5, targets) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_has_a_copy_of_each_weight_that_is_multiplied_with(name: str) -> None:
    """Below the vocabulary projection; a pass keeps them for the way back."""
    config = SHAPE | FAMILIES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    compute_in_bfloat16(model)
    shapes = {tuple(sorted(one.shape)) for one in model.parameters() if one.dim() > 1}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.arange(50)[None], use_cache=False)
    assert states(shape_of(config, name), scale()).copies == _bytes(kept.values())


@pytest.mark.parametrize(("processes", "nodes"), LAYOUTS)
@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: f"{shape.num_parameters:,}")
def test_stage_2_is_not_below_what_deepspeed_estimates(
    shape: Shape, processes: int, nodes: int
) -> None:
    """It cannot be equal: weights are float32 here, and gradients whole until they are handed over."""
    total = shape.num_parameters
    given = {"zero": 2, "processes": processes, "nodes": nodes}
    found = states(shape, scale(**given))
    _, expected = of_stage_2(total, processes, nodes, cpu_offload=False)
    assert found.weights + found.gradients + found.optimizer >= expected
    found = states(shape, scale(**given, offload="optimizer"))
    host, expected = of_stage_2(total, processes, nodes, cpu_offload=True)
    assert found.weights + found.gradients + found.optimizer >= expected
    assert found.host == pytest.approx(host, abs=8) or nodes > 1


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
@pytest.mark.parametrize("rank", [0, 4])
def test_stage_3_holds_what_its_shards_are(rank: int, offload: Any) -> None:
    config = TINY | {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    lora = LoraSettings(rank=rank) if rank else None
    if lora:
        add_adapters(model, lora, 0)
    given = ScaleSettings(zero=3, offload=offload)
    layers = scatter(model, given)
    stepper = Layerwise(model, layers, OptimizerSettings(), offload)
    stepper.begin(0.0)
    model(input_ids=torch.arange(12)[None]).logits.sum().backward()
    stepper.step()
    found = states(shape_of(config, ""), given, lora)
    shards, ends = layers.shards, list(model.parameters())
    here = ends if offload == "all" else [*shards, *ends]
    assert found.weights == _bytes(here)
    assert found.gradients == _bytes(one.grad for one in here if one.grad is not None)
    moments = stepper.state()["adamw"]["state"].values()
    stepped = _bytes(one[name] for one in moments for name in MOMENTS)
    assert found.optimizer == (stepped if offload == "none" else 0)
    away = stepped + 2 * _bytes(copy for _, copy in stepper._copies)  # these get gradients, too
    if offload == "all":
        away += _bytes(shards) + _bytes(one.grad for one in shards if one.grad is not None)
    assert found.host == (away if offload != "none" else 0)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(one.nbytes for one in tensors)


@pytest.mark.parametrize(("processes", "nodes"), LAYOUTS)
@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: f"{shape.num_parameters:,}")
def test_stage_3_is_not_below_what_deepspeed_estimates(
    shape: Shape, processes: int, nodes: int
) -> None:
    """Less its bfloat16 copy of all weights: here only the layer that is gathered has one."""
    total, world = shape.num_parameters, processes * nodes
    largest = max(shape.largest_layer, shape.embedding)
    found = states(shape, scale(zero=3, processes=processes, nodes=nodes))
    _, gpu, layer = of_stage_3(total, largest, processes, nodes, cpu_offload=False)
    held = found.weights + found.gradients + found.optimizer
    assert held >= gpu - layer - 2 * total / world - 16
    assert found.gathered + found.copies >= 4 * shape.largest_layer


def test_frozen_weights_have_neither_gradients_nor_states() -> None:
    shape = MODELS[3]
    full, tuned = (
        states(shape, ScaleSettings()),
        states(shape, ScaleSettings(), LoraSettings(rank=8)),
    )
    adapters = shape.adapters(8)
    assert tuned.weights == full.weights + 4 * adapters
    assert (tuned.gradients, tuned.optimizer) == (4 * adapters, 8 * adapters)
