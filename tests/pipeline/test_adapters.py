"""Adapters from one training to the next: each begins with the model that the one before made."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from katcore.pipeline.trained import run
from katcore.pipeline.training import CONFIGS, load_training
from katcore.plugin import Plugins
from katcore.train.policy import load_policy
from tests.pipeline.test_training import DISTILL, RL, RL_STEPS, SFT, curve, folder, written

__all__ = ["folder"]

FAST = {"lr": 1e-2, "warmup": 1}
TRAININGS: dict[str, dict[str, Any]] = {
    "sft": SFT | {"sft": FAST | {"steps": 3, "batch": 4}},
    "rl": RL | {"model": "m/sft", "rl": RL_STEPS | FAST | {"minibatches": 1}},
    "distill": DISTILL | {"model": "m/sft", "distill": FAST | {"steps": 2, "prompts": 2}},
}


@pytest.mark.slow
def test_each_leaves_an_adapter_and_the_model_that_has_it(folder: Path) -> None:
    for verb, config in TRAININGS.items():
        path = written(folder, verb, config | {"lora": {"rank": 2}})
        out = run(path, load_training(path, CONFIGS[verb]), Plugins.installed()).path
        start = folder / ("base" if verb == "sft" else "m/sft/model")
        made = load_policy(out / "model").state_dict()
        adapted = peft.PeftModel.from_pretrained(load_policy(start), out / "adapter")
        wanted = adapted.merge_and_unload().state_dict()
        torch.testing.assert_close(made, dict(wanted), rtol=0, atol=1e-6)
        before = load_policy(start).state_dict()
        changed = {name for name, value in made.items() if not torch.equal(value, before[name])}
        assert changed == {name for name in made if name.endswith("proj.weight")}
    # One update of each step's rollouts, by the weights that made them: adapters are sampled from as trained.
    for row in curve(folder / "m" / "rl"):
        assert row["num_useful"]
        assert row["kl_old"] == pytest.approx(0, abs=1e-6)
