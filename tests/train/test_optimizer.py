"""AdamW as its settings say, written out; the same where layers are scattered."""

import pytest
import torch

from katcore.settings import OptimizerSettings, ScaleSettings
from katcore.train.objective import Sft
from katcore.train.trainer import Schedule, Trainer
from tests.train.trees import VOCABULARY, line, small_model

LR, STEPS = 1e-2, 4
SETTINGS = [
    OptimizerSettings(),
    OptimizerSettings(betas=(0.5, 0.8), weight_decay=0.3, max_norm=1e-3),
    OptimizerSettings(betas=(0.0, 0.999), max_norm=1e9),
]


def trainer(settings: OptimizerSettings, **scale: int) -> Trainer:
    given = ScaleSettings.model_validate(scale)
    return Trainer(small_model(), Schedule(LR, 99, final_lr=1.0), scale=given, optimizer=settings)


def update(made: Trainer) -> float:
    ids = [at * 7 % VOCABULARY for at in range(9)]
    return made.update([line(ids, [False, *[True] * 8])], Sft())["grad_norm"]


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in made.weights().items()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_are_those_of_the_paper(settings: OptimizerSettings) -> None:
    made = trainer(settings)
    named = dict(made.model.named_parameters())
    own = {name: one.detach().clone() for name, one in named.items()}
    first = {name: torch.zeros_like(one) for name, one in own.items()}
    second = {name: torch.zeros_like(one) for name, one in own.items()}
    one, two = settings.betas
    for step in range(1, STEPS + 1):
        whole = update(made)
        grads = {name: parameter.grad for name, parameter in named.items()}
        norm = torch.cat([grad.flatten() for grad in grads.values() if grad is not None]).norm()
        assert float(norm) == pytest.approx(min(whole, settings.max_norm), rel=1e-3)
        for name, grad in grads.items():
            assert grad is not None
            first[name] = one * first[name] + (1 - one) * grad
            second[name] = two * second[name] + (1 - two) * grad**2
            root = (second[name] / (1 - two**step)).sqrt() + 1e-8
            mean = first[name] / (1 - one**step)
            own[name] = own[name] - LR * (settings.weight_decay * own[name] + mean / root)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), own[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_they_are_the_same_where_layers_are_scattered(settings: OptimizerSettings) -> None:
    """The other stages need several processes: tests/train/test_ranks.py."""
    alone, spread = trainer(settings), trainer(settings, zero=3)
    for _ in range(STEPS):
        assert update(spread) == pytest.approx(update(alone), rel=1e-10)
    found = weights(spread)
    for name, wanted in weights(alone).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-10)
