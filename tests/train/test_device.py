"""Where a model is not on the CPU nothing meets a tensor elsewhere: with tensors that have no numbers.

FlexAttention is left out: it is for GPUs alone, and compiled there.
"""

import copy
from typing import Any, Literal, cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from katcore.errors import ConfigError
from katcore.inference.chat import ChatTokenizer
from katcore.inference.embedded import EmbeddedEngine
from katcore.settings import OptimizerSettings
from katcore.train import ranks
from katcore.train.balance import masses
from katcore.train.batch import collate
from katcore.train.distill import Distillation, Divergence, Kind, Overlap, Teachers
from katcore.train.layerwise import Layerwise
from katcore.train.layout import padded
from katcore.train.objective import Objective, Sft
from katcore.train.policy import hidden, logits_of
from katcore.train.scattered import Scattered
from katcore.train.surrogate import Clipped, PolicyGradient, Reference
from tests.train.architectures import CONFIGS
from tests.train.trees import sample

ELSEWHERE = "meta"
"""A device that every build of torch has; fake tensors on it refuse others as those on a GPU do."""
TREE = sample([5, 6, 7, 8, 9], [-1, 0, 1, 1, 3], [False, True, True, True, True])


def objectives(model: torch.nn.Module) -> dict[str, Objective]:
    """One of each kind."""
    kinds: tuple[Kind, ...] = ("reverse-kl", "top-k", "policy-gradient")
    found: dict[str, Objective] = {"sft": Sft()}
    shape = Clipped("turn", "rollout", 0.2, 0.28, 1.0, kl=0.1, entropy=0.1)
    advantages = {"r": ([1.0, -1.0], [0.5, 0.5])}
    found["rl"] = PolicyGradient(advantages, shape, reference=Reference(model, 1.0))
    for kind in kinds:
        divergence = Divergence(kind, k=4, overlap=Overlap(4))
        found[kind] = Distillation(Teachers({"d": model}), divergence)
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_losses_are_computed_where_the_model_is(name: str) -> None:
    batch = collate([TREE], layout=padded)
    is_mixture = "moe" in name
    given = {"experts_implementation": "grouped_mm"} if is_mixture else {}
    config = copy.deepcopy(CONFIGS[name])
    config.moe_intermediate_size = 16  # the products of experts want rows of 16 bytes
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(ELSEWHERE):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **given)
        options = {"output_router_logits": True} if is_mixture else {}
        said = hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT, **options)
        logits = logits_of(model, said.last_hidden_state.flatten(0, 1)[batch.at_N])
        assert logits.device.type == ELSEWHERE
        if options:
            assert masses(said.router_logits, batch.counts_P, 2)[1].device.type == ELSEWHERE
        for objective in objectives(model).values():
            terms = objective.on(batch, [TREE]).terms(logits, torch.arange(len(logits)))
            learnt = [value for value in terms.values() if value.requires_grad]
            torch.autograd.backward(
                learnt, [value.cpu().to(value) for value in learnt], retain_graph=True
            )
            assert {value.device.type for value in terms.values()} == {ELSEWHERE}


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_scattered_weights_compute_elsewhere_and_step_in_main_memory(
    offload: Literal["optimizer", "all"],
) -> None:
    batch = collate([TREE], layout=padded)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(ELSEWHERE):
            model: Any = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        layers = Scattered(model, torch.device(ELSEWHERE), on_cpu=offload == "all")
        stepper = Layerwise(model, layers, OptimizerSettings(), offload)
        said = hidden(model, batch.ids_BT, batch.positions_BT, batch.mask_BTT)
        assert said.last_hidden_state.device.type == ELSEWHERE
        said.last_hidden_state.sum().backward()
        stepper._change()
        grads = [one.grad for one in layers.shards if one.grad is not None]
        assert len(grads) == len(layers.shards)
        kept = {one.device.type for one in (*layers.shards, *grads)}
        assert kept == {"cpu" if offload == "all" else ELSEWHERE}
        states = stepper.state()["adamw"]["state"].values()
        where = {one[name].device.type for one in states for name in ("exp_avg", "exp_avg_sq")}
        assert where == {"cpu"}
        assert {one.device.type for one in layers.gathered().values()} == {"cpu"}


def test_an_engine_computes_where_its_model_is() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(ELSEWHERE):
            model: Any = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        engine: Any = EmbeddedEngine(model, cast(ChatTokenizer, None), num_slots=2, context=8)
        ids, places = torch.tensor([[5, 6]]), torch.tensor([[0, 1]])
        logits = engine._forward([1], ids, places, 2, torch.tensor([1]))
        assert (logits.shape, logits.device.type) == ((1, model.config.vocab_size), "cpu")


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="sees no GPU here; set device: cpu"):
        ranks.device("cuda")
