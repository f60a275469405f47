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
from katcore.train.layout import packed, padded, unrolled
from katcore.train.objective import token_logprobs
from katcore.train.policy import hidden, logits_of
from katcore.train.precision import compute_in_bfloat16, narrow
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
    folder = written(CONFIGS[name], tmp_path)
    scale = ScaleSettings(precision="bfloat16", zero=zero)
    preset = BFLOAT16.model_copy(update={"scale": scale})
    student = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    trainer = Trainer(student, Schedule(0.0, 1), scale=scale)
    compute_in_bfloat16(student)
    teacher = load_frozen(folder, preset, beside=student)
    if name in ("qwen3-moe", "mixtral"):
        teacher.set_experts_implementation("eager")
    distillation = Distillation(Teachers({"d": teacher}))
    trainer.update([TREE], distillation)
    assert distillation.seen()["kl"] == 0.0
    held = teacher.scattered.shards if zero else list(teacher.base_model.layers.parameters())
    num = sum(one.numel() for one in held)
    assert 2 * num < sum(one.nbytes for one in held) < 2.4 * num
    assert teacher.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_by_grouped_products_are_near(name: str) -> None:
    config = copy.deepcopy(CONFIGS[name])
    config.moe_intermediate_size = config.intermediate_size = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").eval()
    ids = torch.arange(6)[None]
    wanted = hidden(model, ids, ids, None).last_hidden_state
    narrow(model)
    compute_in_bfloat16(model)
    assert relative(hidden(model, ids, ids, None).last_hidden_state, wanted) < 0.1
