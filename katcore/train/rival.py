"""Steps of TRL's trainers on rollouts that are there already, each followed by the same step of ours.

Both start from the same weights, have the same optimizer, and see the same tokens: TRL the branches, padded
to the longest, ours what they are given. So the losses of all steps have to be the same, which shows that the
updates are. What TRL does by default to save memory, or to report, is off where ours has no counterpart.
Seconds are the processor's, from the batch to the new weights.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from katcore.schema.sample import Sample
from katcore.train.measure import lines
from katcore.train.objective import Objective, Sft
from katcore.train.surrogate import Clipped, PolicyGradient
from katcore.train.trainer import Schedule, Trainer

constants.HF_HUB_DISABLE_TELEMETRY = True
"""TRL's trainers would report their use."""

_LR = 1e-3
_OPTIONS: Mapping[str, Any] = {
    "learning_rate": _LR,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass(frozen=True, slots=True)
class Side:
    """Seconds and losses of the steps of one of the two."""

    seconds: list[float]
    losses: list[float]


def sampled(model: Any, trees: Sequence[Sample]) -> list[Sample]:
    """As if by a policy a little off the model, so that some ratios are clipped and some not."""
    draw = torch.Generator().manual_seed(0)
    found = Trainer(model, Schedule(0.0, 1)).logprobs(trees)
    made = []
    for tree in trees:
        values = torch.tensor(found[tree.rollout_id])
        values += 0.3 * torch.randn(len(values), generator=draw)
        left = iter(values.tolist())
        given = tuple(next(left) if yes else 0.0 for yes in tree.trained)
        made.append(replace(tree, logprobs=given))
    return made


def sft(model: Any, trees: Sequence[Sample], num: int, folder: Path) -> tuple[Side, Side]:
    """Supervised steps: TRL's, ours."""
    branches = [line for tree in trees for line in lines(tree)]
    rows = [
        {
            "input_ids": list(line.tokens),
            "labels": [
                token if yes else -100 for token, yes in zip(line.tokens, line.trained, strict=True)
            ],
        }
        for line in branches
    ]
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        max_steps=num,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        **_OPTIONS,
    )
    theirs = _Sft(
        _copy(model),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(model),
    )
    return _in_turn(theirs, model, trees, Sft())


def grpo(model: Any, trees: Sequence[Sample], num: int, folder: Path) -> tuple[Side, Side]:
    """Steps of reinforcement with the clip per token and the mean per rollout: TRL's, ours.

    Each tree has one advantage; half of them are 1, the others -1.
    """
    advantages = {tree.rollout_id: 1.0 - 2.0 * (at % 2) for at, tree in enumerate(trees)}
    branches = [(line, advantages[tree.rollout_id]) for tree in trees for line in lines(tree)]
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(branches),
        num_generations=len(branches),
        max_steps=num,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="grpo",
        **_OPTIONS,
    )
    theirs = _Grpo(
        _copy(model),
        lambda completions, **_: [0.0] * len(completions),
        args,
        train_dataset=Dataset.from_list([{"prompt": "0"}] * len(branches)),
        processing_class=_tokenizer(model),
    )
    theirs.canned = _canned(branches)
    rows = {tree.rollout_id: ((advantages[tree.rollout_id],) * len(tree.tokens),) for tree in trees}
    return _in_turn(theirs, model, trees, PolicyGradient(rows, Clipped("token", "rollout")))


class _Noting:
    """Notes the losses of a TRL trainer, and when its steps begin and end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **options)  # type: ignore[misc]
        self.losses.append(float(loss))
        return loss


class _Sft(_Noting, SFTTrainer):  # type: ignore[misc]
    pass


class _Grpo(_Noting, GRPOTrainer):  # type: ignore[misc]
    canned: Mapping[str, Tensor]

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        return dict(self.canned)


class _Turns(TrainerCallback):  # type: ignore[misc]
    """Times their steps, and takes one of ours after each."""

    def __init__(self, ours: Callable[[], float]) -> None:
        self.theirs: list[float] = []
        self.ours = Side([], [])
        self._take = ours
        self._started_s = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started_s = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        ended_s = time.process_time()
        self.theirs.append(ended_s - self._started_s)
        self.ours.losses.append(self._take())
        self.ours.seconds.append(time.process_time() - ended_s)


def _in_turn(
    theirs: Any, model: Any, trees: Sequence[Sample], objective: Objective
) -> tuple[Side, Side]:
    trainer = Trainer(copy.deepcopy(model), Schedule(_LR, 1, final_lr=1.0))
    turns = _Turns(lambda: float(trainer.update(trees, objective)["loss"]))
    theirs.add_callback(turns)
    theirs.remove_callback(PrinterCallback)
    theirs.train()
    return Side(turns.theirs, theirs.losses), turns.ours


def _canned(branches: Sequence[tuple[Sample, float]]) -> dict[str, Tensor]:
    """What `GRPOTrainer` makes of rollouts: the prompt is what all of them have before the first answer."""
    start = min(line.trained.index(True) for line, _ in branches)
    length = max(len(line.tokens) for line, _ in branches) - start

    def padded(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values, *[0] * (length - len(values))], dtype=dtype)

    def stacked(of: Callable[[Sample], Sequence[float]], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.stack([padded(of(line)[start:], dtype) for line, _ in branches])

    prompts = torch.tensor([line.tokens[:start] for line, _ in branches])
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": stacked(lambda line: line.tokens),
        "completion_mask": stacked(lambda line: (1,) * len(line.tokens)),
        "tool_mask": stacked(lambda line: line.trained),
        "old_per_token_logps": stacked(lambda line: line.logprobs, torch.float),
        "advantages": torch.tensor([advantage for _, advantage in branches]),
    }


def _copy(model: Any) -> Any:
    """With the attention that TRL would use."""
    made = copy.deepcopy(model)
    made.set_attn_implementation("sdpa")
    return made


def _tokenizer(model: Any) -> PreTrainedTokenizerFast:
    """One that names ids by their numbers."""
    words = {str(token): token for token in range(model.config.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
