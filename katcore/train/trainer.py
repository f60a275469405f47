"""The one training engine: an optimiser step over samples under an objective; checkpoints that resume."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from katcore.config import Preset
from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.train import head
from katcore.train.batch import Weighting, micro_batches, num_leaves
from katcore.train.engine import Engine
from katcore.train.layout import unrolled
from katcore.train.objective import Metrics, Objective
from katcore.train.support import Trees, takes_trees


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up to `lr` over `warmup` steps, then linear decay to `final_lr * lr` at `steps`."""

    lr: float
    steps: int
    warmup: int = 0
    final_lr: float = 0.0
    weight_decay: float = 0.0

    def at(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 - (1 - self.final_lr) * min(1.0, done))


def engine_options(preset: Preset) -> dict[str, Any]:
    """What a preset says of how batches are computed, for `Trainer`."""
    return {
        "max_tokens": preset.micro_batch_tokens,
        "trees": preset.tree,
        "balance": preset.balance,
    }


class Trainer:
    """AdamW (0.9, 0.95), gradient norm clipped at 1.

    `max_tokens` bounds the tokens whose activations are held at once: larger trees are computed in parts.
    `trees` says what becomes of a model that cannot be given trees (`support`); `balance` weighs the
    load-balancing loss of a mixture of experts.
    """

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        *,
        max_tokens: int = 8192,
        weighting: Weighting = "path",
        trees: Trees = "auto",
        balance: float = 0.0,
    ) -> None:
        self.model = model
        self._engine = Engine(
            model, weighting, None if takes_trees(model, trees) else unrolled, balance
        )
        self.step_number = 0
        self._schedule = schedule
        self._max_tokens = max_tokens
        self._weighting = weighting
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=schedule.lr,
            betas=(0.9, 0.95),
            weight_decay=schedule.weight_decay,
            fused=True,
        )

    def update(
        self,
        samples: Sequence[Sample],
        objective: Objective,
        *,
        by: Callable[[Sample], str] = lambda _: "",
    ) -> Metrics:
        """One optimiser step on the objective's mean; `tokens_per_s` counts all tokens of the samples.

        Samples that `by` tells apart never share a micro-batch.
        """
        started_s = time.perf_counter()
        weight = objective.weight(samples, self._weighting)
        lr = self._schedule.at(self.step_number)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = 0.0
        self._optimizer.zero_grad(set_to_none=True)
        for rows in self._micro_batches(samples, by):
            if self._is_too_large(rows[0]):
                loss += self._engine.backward_in_parts(rows[0], objective, weight, self._max_tokens)
            else:
                loss += self._engine.backward(rows, objective, weight)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, 1.0))
        if not math.isfinite(norm):
            raise StageError(f"step {self.step_number}: the gradient is not finite (loss {loss})")
        self._optimizer.step()
        self.step_number += 1
        speed = sum(len(sample.tokens) for sample in samples) / (time.perf_counter() - started_s)
        return {"loss": loss, "grad_norm": norm, "lr": lr, "tokens_per_s": speed}

    def logprobs(
        self, samples: Sequence[Sample], temperature: float = 1.0
    ) -> dict[str, list[float]]:
        """Log-probabilities of the trained tokens under the weights as they are, by rollout id."""
        found: dict[str, list[float]] = {sample.rollout_id: [] for sample in samples}
        with torch.no_grad():
            for rows in self._micro_batches(samples):
                batch = self._engine.collate(rows)
                hidden_ND = self._engine.forward(batch).last_hidden_state.flatten(0, 1)[batch.at_N]
                logprob_N = head.logprobs(self.model, hidden_ND, batch.targets_N, temperature)
                for row, value in zip(batch.rows_N.tolist(), logprob_N.tolist(), strict=True):
                    found[rows[row].rollout_id].append(value)
        return found

    def _micro_batches(
        self, samples: Sequence[Sample], by: Callable[[Sample], str] = lambda _: ""
    ) -> Iterator[list[Sample]]:
        return micro_batches(
            samples,
            max_tokens=self._max_tokens,
            by=by,
            is_unrolled=self._engine.layout is unrolled,
        )

    def _is_too_large(self, sample: Sample) -> bool:
        """Whether a tree is computed in parts; a single branch is one whatever its length."""
        is_long = len(sample.tokens) > self._max_tokens
        return is_long and self._engine.layout is None and num_leaves(sample) > 1

    def save(self, path: Path, **extra: Any) -> None:
        """Write a checkpoint: complete or not at all, and on disk when this returns."""
        state = {
            "step": self.step_number,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "extra": extra,
        }
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from a checkpoint if there is one; returns its `extra`, empty if there was none."""
        if not path.exists():
            return {}
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step_number = state["step"]
        extra: dict[str, Any] = state["extra"]
        return extra
