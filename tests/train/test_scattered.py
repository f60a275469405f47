"""A scattered model writes what the whole one would, and one beside it stays as it was."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from katcore.settings import ScaleSettings
from katcore.train.policy import hidden, save_policy
from katcore.train.scattered import scatter
from katcore.train.trainer import Schedule, Trainer
from tests.train.architectures import tiny

SCATTERED = ScaleSettings(zero=3)


@pytest.mark.parametrize("name", ["smollm2", "qwen3-moe"])
def test_gathered_weights_are_written_as_those_of_a_whole_model(tmp_path: Path, name: str) -> None:
    """Of tied embeddings once, and of experts each."""
    model = tiny(name)
    save_policy(model, tmp_path / "whole", tokenizer=tmp_path)
    trainer = Trainer(model, Schedule(0.0, 1), scale=SCATTERED)
    save_policy(model, tmp_path / "now", tokenizer=tmp_path, weights=trainer.weights())
    trainer.publish(tmp_path / "end", tokenizer=tmp_path)
    files = [tmp_path / part / "model.safetensors" for part in ("whole", "now", "end/model")]
    whole, now, end = (load_file(file) for file in files)
    assert whole.keys() == now.keys() == end.keys()
    for key, weight in whole.items():
        assert torch.equal(weight, now[key])
        assert torch.equal(weight, end[key])


def test_one_beside_it_stays_as_it_was() -> None:
    ids = torch.arange(5)[None]
    model, kept = tiny("llama"), tiny("llama")
    wanted = hidden(copy.deepcopy(model), ids, ids, None).last_hidden_state
    trainer = Trainer(model, Schedule(0.0, 1), scale=SCATTERED)
    scatter(kept, SCATTERED, beside=model)
    with torch.no_grad():
        for shard in model.scattered.shards:
            shard += 1.0
        found = hidden(kept, ids, ids, None).last_hidden_state
        changed = hidden(trainer.model, ids, ids, None).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (changed - wanted).abs().max() > 0.1
