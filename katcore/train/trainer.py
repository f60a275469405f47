"""The one training engine: an optimiser step over samples under an objective; checkpoints that resume."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from katcore.config import Preset
from katcore.errors import StageError
from katcore.schema.sample import Sample
from katcore.settings import OptimizerSettings, ScaleSettings
from katcore.train import chance, checkpoint, head, lockstep, ranks, scattered
from katcore.train.batch import Weighting, micro_batches, num_leaves
from katcore.train.engine import Engine
from katcore.train.layerwise import Layerwise
from katcore.train.layout import unrolled
from katcore.train.objective import Metrics, Objective
from katcore.train.policy import save_policy
from katcore.train.replay import Routes
from katcore.train.stepper import Replicated, Stepper
from katcore.train.support import Trees, takes_trees

_ALONE = ScaleSettings()
_ADAMW = OptimizerSettings()
_LOG = logging.getLogger(__name__)
_MOST_SKIPPED = 5
"""So many updates in a row may be skipped; the next one is an error."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up to `lr` over `warmup` steps, then linear decay to `final_lr * lr` at `steps`."""

    lr: float
    steps: int
    warmup: int = 0
    final_lr: float = 0.0

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
        "weighting": preset.weighting,
        "balance": preset.balance,
        "scale": preset.scale,
        "optimizer": preset.optimizer,
    }


class Trainer:
    """Steps of a model, by this process or together with others (`ranks`), which all do the same calls.

    `max_tokens` bounds the tokens whose activations are held at once: larger trees are computed in parts.
    `trees` says what becomes of a model that cannot be given trees (`support`); `balance` weighs the
    load-balancing loss of a mixture of experts.
    """

    def __init__(  # noqa: PLR0913  what a preset says of it
        self,
        model: Any,
        schedule: Schedule,
        *,
        max_tokens: int = 8192,
        weighting: Weighting = "path",
        trees: Trees = "auto",
        balance: float = 0.0,
        scale: ScaleSettings = _ALONE,
        optimizer: OptimizerSettings = _ADAMW,
    ) -> None:
        ranks.join()
        self.model = model
        self._engine = Engine(
            model, weighting, None if takes_trees(model, trees) else unrolled, balance
        )
        self.step_number = 0
        self._num_skipped = 0
        self._schedule = schedule
        self._max_tokens = max_tokens
        self._weighting = weighting
        self._stepper = _stepper(model, optimizer, scale)
        self._zero = scale.zero
        # peft is imported where there are adapters: it takes seconds.
        has_adapters = hasattr(model, "peft_config")
        self._lora: Any = import_module("katcore.train.lora") if has_adapters else None

    def update(
        self,
        samples: Sequence[Sample],
        objective: Objective,
        *,
        by: Callable[[Sample], str] = lambda _: "",
    ) -> Metrics:
        """One optimiser step on the objective's mean; `tokens_per_s` counts all tokens of the samples.

        Samples that `by` tells apart never share a micro-batch. If the gradient is not finite, weights and
        optimizer stay as they are: the step is `skipped`, and there is no `loss` and no `grad_norm`.

        Raises:
            StageError: too many in a row were skipped.
        """
        started_s = time.perf_counter()
        weight = objective.weight(samples, self._weighting)
        lr = self._schedule.at(self.step_number)
        self._stepper.begin(lr)
        loss = 0.0
        with self._lora.dropping(self.model) if self._lora else nullcontext():
            passes = list(self._micro_batches(self._own(samples), by))
            num = max(ranks.gathered(len(passes)))
            for at in range(num):
                if at < len(passes):
                    loss += self._backward(passes[at], objective, weight)
                self._stepper.collect(is_last=at == num - 1)
        self._finish()
        loss = ranks.totals({"loss": loss})["loss"]
        norm = self._stepper.step()
        is_skipped = self._is_skipped(norm, loss)
        self.step_number += 1
        speed = sum(len(sample.tokens) for sample in samples) / (time.perf_counter() - started_s)
        found = {"skipped": float(is_skipped), "lr": lr, "tokens_per_s": speed}
        return found if is_skipped else found | {"loss": loss, "grad_norm": norm}

    def _is_skipped(self, norm: float, loss: float) -> bool:
        """Whether the update changed nothing, which all processes see alike: the norm is that of all."""
        if math.isfinite(norm):
            self._num_skipped = 0
            return False
        self._num_skipped += 1
        found = f"the gradient is not finite (norm {norm}, loss {loss})"
        if self._num_skipped > _MOST_SKIPPED:
            raise StageError(
                f"update {self.step_number}: {found}, as in the {_MOST_SKIPPED} before it; the weights are as"
                " they were before these. Begin anew with a lower lr; if the first update fails, look for"
                " weights that are not finite in the model"
            )
        if ranks.rank() == 0:
            _LOG.warning("update %d is skipped: %s", self.step_number, found)
        return True

    def replay(self, routes: Routes | None) -> None:
        """From now on, samples' tokens are sent to these experts (`replay`); None lets routers choose again.

        Raises:
            StageError: the model is trained on branches, in which a token has several places.
        """
        if routes is not None and self._engine.layout is unrolled:
            raise StageError(
                f"{type(self.model).__name__} is trained on branches, not on token trees: routes cannot be"
                " replayed; train it without router replay"
            )
        self._engine = replace(self._engine, routes=routes)

    def _backward(self, rows: list[Sample], objective: Objective, weight: float) -> float:
        if self._is_too_large(rows[0]):
            return self._engine.backward_in_parts(rows[0], objective, weight, self._max_tokens)
        return self._engine.backward(rows, objective, weight)

    def _own(self, samples: Sequence[Sample]) -> list[Sample]:
        """Those that this process computes."""
        width = self.model.config.get_text_config().hidden_size
        return [samples[at] for at in ranks.spread(samples, ranks.world(), width)[ranks.rank()]]

    def logprobs(
        self, samples: Sequence[Sample], temperature: float = 1.0
    ) -> dict[str, list[float]]:
        """Log-probabilities of the trained tokens under the weights as they are, by rollout id."""
        own = self._own(samples)
        found: dict[str, list[float]] = {sample.rollout_id: [] for sample in own}
        with torch.no_grad():
            for rows in self._micro_batches(own):
                batch = self._engine.collate(rows)
                hidden_ND = self._engine.forward(batch).last_hidden_state.flatten(0, 1)[batch.at_N]
                logprob_N = head.logprobs(self.model, hidden_ND, batch.targets_N, temperature)
                for row, value in zip(batch.rows_N.tolist(), logprob_N.tolist(), strict=True):
                    found[rows[row].rollout_id].append(value)
            self._finish()
        return {name: values for part in ranks.gathered(found) for name, values in part.items()}

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

    def _trained(self) -> dict[str, Any]:
        """Weights that are not those that the model started with; without layers that are scattered."""
        own = self.model.named_parameters(remove_duplicate=False)
        fixed = {name for name, parameter in own if not parameter.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name not in fixed}

    def save(self, path: Path, **extra: Any) -> None:
        """Write a checkpoint (`checkpoint`) that is on disk when this returns."""
        whole = {
            "step": self.step_number,
            "model": self._trained(),
            "scale": self._spread(),
            "extra": extra,
        }
        own = {"optimizer": self._stepper.state(), "rng": chance.states(self.model.device)}
        checkpoint.write(path, self.step_number, whole, own)

    def load(self, path: Path) -> dict[str, Any]:
        """Go on from the last checkpoint if there is one; returns its `extra`, empty if there was none."""
        found = checkpoint.read(path, **self._spread())
        if found is None:
            return {}
        whole, own = found
        self.model.load_state_dict(whole["model"], strict=False)
        self._stepper.load(own["optimizer"])
        chance.restore(own["rng"], self.model.device)
        self.step_number = whole["step"]
        extra: dict[str, Any] = whole["extra"]
        return extra

    def _finish(self) -> None:
        if together := lockstep.of(self.model):
            together.finish()

    def _spread(self) -> dict[str, int]:
        """What the optimizer's state depends on."""
        return {"processes": ranks.world(), "zero": self._zero}

    def weights(self) -> dict[str, Tensor]:
        """Those that are trained, as they are; of layers that are scattered the first process has copies.

        All have to call it.
        """
        layers = scattered.of(self.model)
        return self._trained() | (layers.gathered() if layers else {})

    def publish(self, out: Path, *, tokenizer: Path) -> None:
        """Write `model/` and, of adapters, `adapter/`; adapters are then part of the model's weights.

        Of several processes the first writes.
        """
        if layers := scattered.of(self.model):
            layers.restore()
        if ranks.rank():
            return
        if self._lora:
            self._lora.save_adapter(self.model, out / "adapter")
            self._lora.merge(self.model)
        save_policy(self.model, out / "model", tokenizer=tokenizer)


def _stepper(model: Any, settings: OptimizerSettings, scale: ScaleSettings) -> Stepper:
    if scale.zero == 3:
        layers = scattered.of(model) or scattered.scatter(model, scale)
        return Layerwise(model, layers, settings, scale.offload)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not scale.zero:
        return Replicated(parameters, settings)
    # Imported where it is asked for, as peft is.
    sharded = import_module("katcore.train.sharded")
    stepper: Stepper = sharded.Sharded(parameters, settings, scale)
    return stepper
