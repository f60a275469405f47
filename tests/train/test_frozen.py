"""Models that are only looked at: what they say of trees, and in which precision they are held."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, CohereConfig, MistralConfig, PreTrainedConfig

from katcore.config import Preset
from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.settings import ScaleSettings
from katcore.train import frozen, support
from katcore.train.batch import collate
from katcore.train.distill import Distillation, Teachers
from katcore.train.engine import Engine
from katcore.train.layout import packed, padded, unrolled
from katcore.train.objective import Sft, token_logprobs
from katcore.train.policy import logits_of
from katcore.train.precision import compute_in_bfloat16
from katcore.train.prepare import load_frozen
from katcore.train.surrogate import Reference
from katcore.train.trainer import Schedule, Trainer
from tests.train.architectures import CONFIGS, SHAPE, tiny
from tests.train.test_attention import logits_of_branches, relative
from tests.train.trees import sample, tree_samples

WINDOWED = MistralConfig(**SHAPE, sliding_window=3)
TREE = sample([*range(1, 11)], [-1, 0, 1, 2, 3, 4, 2, 6, 7, 8], [False, *[True] * 9])
BFLOAT16 = Preset(name="p", summary="", scale=ScaleSettings(precision="bfloat16"))


def written(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def even(name: str) -> PreTrainedConfig:
    """With rows of 16 bytes, as real models have, which grouped products want."""
    config = copy.deepcopy(CONFIGS[name])
    if name == "qwen3-moe":
        config.moe_intermediate_size = 16
    return config


def said(model: Any, trees: list[Sample], layout: Any) -> torch.Tensor:
    """A teacher's logits of the trained tokens."""
    batch = collate(trees, layout=layout)
    return logits_of(model, frozen.hidden_at(model, batch, trees))


@settings(max_examples=10, deadline=None)
@given(
    st.lists(tree_samples(), min_size=1, max_size=3), st.sampled_from([padded, packed, unrolled])
)
def test_one_with_a_window_sees_branches(trees: list[Sample], layout: Any) -> None:
    trees = [tree for tree in trees if any(tree.trained)]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WINDOWED).double().eval()
    assert not support.takes_trees(model)
    if trees:
        wanted = logits_of_branches(model, trees)
        assert relative(said(model, trees, layout), wanted) < 1e-5  # its norms compute in float32
        logprobs = [token_logprobs(wanted, collate(trees).targets_N, 0.7)]
        found = Reference(model, 0.7)(collate(trees, layout=layout), trees)
        assert relative(found, torch.cat(logprobs)) < 1e-5


def test_a_tree_would_be_wrong_for_it() -> None:
    model = AutoModelForCausalLM.from_config(WINDOWED).double().eval()
    assert relative(said(model, [TREE], packed), logits_of_branches(model, [TREE])) > 1e-3


@pytest.mark.parametrize("precision", get_args(ScaleSettings.model_fields["precision"].annotation))
def test_a_loaded_one_with_a_window_teaches_on_branches(precision: str, tmp_path: Path) -> None:
    folder, student = written(WINDOWED, tmp_path), tiny("llama")
    preset = BFLOAT16.model_copy(update={"scale": ScaleSettings(precision=precision)})
    teacher = load_frozen(folder, preset, beside=student)
    found = Teachers({"d": teacher})(collate([TREE], layout=packed), [TREE])
    wanted = logits_of_branches(AutoModelForCausalLM.from_pretrained(folder).eval(), [TREE])
    limit = 1e-5 if precision == "float32" else 0.05
    assert relative(found[torch.arange(9)], wanted) < limit
    with pytest.raises(StageError, match=f"{folder}: .*cannot be given token trees"):
        load_frozen(folder, preset.model_copy(update={"tree": "required"}), beside=student)


def test_one_that_scales_its_logits_does_not_teach(tmp_path: Path) -> None:
    folder = written(CohereConfig(**SHAPE, logit_scale=0.5, pad_token_id=0), tmp_path)
    with pytest.raises(StageError, match="can neither be trained nor teach"):
        load_frozen(folder, BFLOAT16, beside=tiny("llama"))


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_a_teacher_with_the_student_s_weights_is_the_student(
    name: str, zero: int, tmp_path: Path
) -> None:
    """It is held in half the memory, and not one number is another: KL is 0, not nearly."""
    folder = written(even(name), tmp_path)
    scale = ScaleSettings(precision="bfloat16", zero=zero)
    preset = BFLOAT16.model_copy(update={"scale": scale})
    student = AutoModelForCausalLM.from_pretrained(folder).eval()
    compute_in_bfloat16(student)
    trainer = Trainer(student, Schedule(0.0, 1), scale=scale)
    teacher = load_frozen(folder, preset, beside=student)
    distillation = Distillation(Teachers({"d": teacher}))
    trainer.update([TREE], distillation)
    assert distillation.seen()["kl"] == 0.0
    held = teacher.scattered.shards if zero else list(teacher.base_model.layers.parameters())
    num = sum(one.numel() for one in held)
    assert 2 * num < sum(one.nbytes for one in held) < 2.4 * num
    assert teacher.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_in_bfloat16_experts_compute_in_it_and_learn_in_float32(name: str, experts: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(even(name), experts_implementation=experts).eval()

    def learnt() -> torch.Tensor:
        model.zero_grad()
        Engine(model).backward([TREE], Sft(), 1.0)
        grads = [one.grad.flatten() for one in model.parameters() if one.dim() == 3]
        assert {grad.dtype for grad in grads} == {torch.float32}
        return torch.cat(grads)

    wanted = learnt()
    compute_in_bfloat16(model)
    kept: set[tuple[torch.Size, torch.dtype]] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.add((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = learnt()
    shapes = {one.shape for one in model.parameters() if one.dim() == 3}
    shapes |= {one.mT.shape for one in model.parameters() if one.dim() == 3}
    if experts == "grouped_mm":
        assert {dtype for shape, dtype in kept if shape in shapes} == {torch.bfloat16}
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.99
    assert {one.dtype for one in model.parameters()} == {torch.float32}
