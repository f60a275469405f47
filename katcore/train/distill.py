"""Teachers for on-policy distillation: the experts, one per domain."""

from collections.abc import Sequence
from typing import Any

import torch

from katcore.schema.sample import Sample
from katcore.train.batch import TreeBatch
from katcore.train.policy import logits_at


class Teachers:
    """The experts' models, one per domain; each scores the samples of its own domain."""

    def __init__(self, models: dict[str, Any]) -> None:
        self._models = models

    def __call__(self, batch: TreeBatch, samples: Sequence[Sample]) -> torch.Tensor:
        """The teacher's logits of the batch's trained tokens, (N, V). A batch has one domain."""
        (domain,) = {sample.domain for sample in samples}
        with torch.inference_mode():
            return logits_at(
                self._models[domain], batch.ids_BT, batch.positions_BT, batch.mask_BTT, batch.at_N
            )
