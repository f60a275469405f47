"""The benchmark of tree training counts right, and its ways to do a step are one step."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from katcore.bench import training
from katcore.bench.recorded import scaled, sessions, stretches
from katcore.bench.shapes import SHAPES, tree
from katcore.cli import app
from katcore.config import ModelSettings
from katcore.train.forest import depths
from katcore.train.measure import Steps, as_tree, in_packed, in_padded, in_parts, lines


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("por", training.POR)
def test_shapes_share_what_they_are_asked_to(name: str, por: float) -> None:
    parents = SHAPES[name](2048, por)
    depth = depths(parents)
    flat = sum(depth[token] + 1 for token in set(range(len(parents))) - set(parents))
    assert len(parents) == pytest.approx(2048, rel=0.01)
    assert 1 - len(parents) / flat == pytest.approx(por, abs=0.005)


def test_a_session_keeps_its_shape_at_any_size() -> None:
    for session in sessions().values():
        length = sum(stretch.length for stretch in session)
        parents, trained = scaled(session, length)
        assert stretches(tuple(parents), tuple(trained)) == session
        less = scaled(session, length // 20)
        assert len(less[0]) == pytest.approx(length / 20, rel=0.02)
        assert sum(less[1]) / len(less[1]) == pytest.approx(sum(trained) / length, rel=0.2)


def test_what_agents_share_is_as_the_page_says() -> None:
    shared = {}
    for name, session in sessions().items():
        parents, _ = scaled(session, 4096)
        depth = depths(parents)
        flat = sum(depth[token] + 1 for token in set(range(len(parents))) - set(parents))
        shared[name.split()[0]] = 1 - len(parents) / flat
    assert shared["claude-code"] < shared["opencode"] < 0.5 < 0.9 < shared["openclaw"]


def test_all_ways_have_the_same_gradients() -> None:
    settings = ModelSettings(hidden=64, layers=1, heads=1, kv_heads=1, vocabulary=64)
    steps = Steps(settings)
    sample = tree(SHAPES["turns"](200, 0.7), 64, seed=1)
    found = []
    for way in (
        as_tree(sample),
        in_parts(sample),
        in_packed(sample, 300),
        in_padded(sample, 300),
    ):
        steps.loss(way)
        found.append(torch.cat([p.grad.flatten() for p in steps.model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-6)


def test_flops_are_counted_once_for_each_token_and_pair() -> None:
    settings = ModelSettings(hidden=64, layers=1, heads=1, kv_heads=1, vocabulary=64)
    steps = Steps(settings)
    sample = tree(SHAPES["fork"](128, 0.5), 64, seed=1)
    branches = lines(sample)
    apart = sum(steps.flops(as_tree(branch)) for branch in branches)
    assert apart == pytest.approx(steps.flops(in_packed(sample, 1000)))
    assert steps.flops(as_tree(sample)) < apart


def test_the_command_prints_rows_and_draws_them(tmp_path: Path) -> None:
    options = "bench tree --tokens 64 --hidden 64 --layers 1 --rounds 1 --larger --json --plot"
    result = CliRunner().invoke(app, [*options.split(), str(tmp_path / "tree.svg")])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 1 + len(SHAPES) * (len(training.POR) - 1) + 5
    assert all(row["speedup"] > 0 and row["bound_fraction"] > 0 for row in rows)
    drawn = ElementTree.parse(tmp_path / "tree.svg").getroot()
    assert len(drawn.findall("{*}polyline")) == 3 * len(SHAPES)
