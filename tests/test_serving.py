"""Which engines make the rollouts of training: what goes together, and what does not."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from katcore.config import load_preset
from katcore.errors import ConfigError
from katcore.serving import ServeSettings


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"replicas": 2},
        {"placement": "disaggregated", "staleness": 2},
        {"engine": "vllm", "replicas": 2, "tensor_parallel": 2, "devices": [4, 5, 6, 7]},
        {"engine": "vllm", "placement": "disaggregated", "urls": ["http://a:8000"]},
    ],
)
def test_what_goes_together(given: dict[str, Any]) -> None:
    assert ServeSettings.model_validate(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"staleness": 1}, "set placement: disaggregated"),
        ({"tensor_parallel": 2}, "tensor_parallel means nothing with engine: embedded"),
        ({"options": {"dtype": "auto"}}, "options means nothing with engine: embedded"),
        ({"engine": "vllm", "urls": ["http://a"]}, "placement: disaggregated"),
        (
            {
                "engine": "vllm",
                "placement": "disaggregated",
                "urls": ["http://a", "http://b"],
            },
            "set replicas: 2",
        ),
        ({"engine": "vllm", "devices": [0, 1]}, "1 replicas of 1 GPUs need 1 different ones"),
        ({"engine": "vllm", "replicas": 2, "devices": [0, 0]}, "need 2 different ones"),
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"engine": "sglang"}, "'embedded' or 'vllm'"),
        ({"replica": 2}, "Extra inputs"),
    ],
)
def test_what_does_not_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServeSettings.model_validate(given)


@pytest.mark.parametrize("where", ["rl: {mcla: {}}", "experts: {swe: {rl: {mcla: {}}}}"])
def test_an_engine_whose_weights_moved_on_reads_no_rollouts_again(
    tmp_path: Path, where: str
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"summary: x\nserve: {{placement: disaggregated, staleness: 1}}\n{where}\n")
    with pytest.raises(ConfigError, match=r"set staleness: 0, or mcla.place: trainer"):
        load_preset(str(path))
