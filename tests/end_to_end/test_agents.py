"""The released agents, run for real: the matrix's row of each, and one of them around a model of ours."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from katcore.cli import app
from katcore.inference.bytes import write_byte_tokenizer
from katcore.inference.chat import ChatTokenizer
from katcore.pipeline.scaffold_check import COLUMNS
from katcore.schema.codec import read_lines
from katcore.schema.rollout import Rollout
from katcore.schema.sample import Sample
from katcore.trajectory.audit import audit_samples
from katcore.trajectory.calls import calls_by_session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WINDOW = 1 << 16


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Scaffolds are installed once for all tests here."""
    assert shutil.which("npm"), "the agents are npm packages: install Node.js 20 or later"
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("KATCORE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of a few thousand parameters, with a window that takes an agent's prompt."""
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("qwen3"))
    chat = ChatTokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=chat.vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=WINDOW,
        eos_token_id=chat.end_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(str(folder))
    return folder


def write_task(root: Path) -> None:
    folder = root / "greet"
    for name, text in {
        "task.toml": "[agent]\ntimeout_sec = 600.0\n",
        "instruction.md": "Write the word hello into hello.txt.",
        "environment/Dockerfile": "FROM host\nWORKDIR /repo\nRUN git init -q .\n",
        "tests/test.sh": "[ -f hello.txt ]; echo $((1 - $?)) > /logs/verifier/reward.txt\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", ["claude-code", "opencode"])
def test_every_column_of_the_matrix_holds(home: Path, name: str) -> None:
    done = CliRunner().invoke(app, ["scaffolds", "check", name, "--json"])
    cells = json.loads(done.stdout)
    assert [cell["column"] for cell in cells] == list(COLUMNS)
    assert [(cell["column"], cell["why"]) for cell in cells if cell["ok"] is not True] == []
    assert done.exit_code == 0


@pytest.mark.parametrize("name", ["claude-code", "opencode"])
def test_an_agent_drives_a_model_of_ours(
    home: Path, model: Path, tmp_path: Path, name: str
) -> None:
    write_task(tmp_path / "tasks")
    config = {
        "tasks": "tasks",
        "scaffold": {"name": name, "context": WINDOW, "output": 24},
        "engine": {"name": "transformers", "model": str(model), "context": WINDOW, "num_slots": 2},
        "sampling": {"max_tokens": 24},
        "budget": {"max_calls": 2},
    }
    (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["collect", str(tmp_path / f"{name}.yaml")])
    assert done.exit_code == 0, done.output
    folder = home / "collections" / name
    (rollout,) = read_lines(Rollout, folder / "rollouts.jsonl")
    assert rollout.scaffold.startswith(f"{name} ")
    turns = rollout.trajectory.turns
    assert turns
    assert {turn.origin for turn in turns} == {"sampled"}
    samples = list(read_lines(Sample, folder / "tree.jsonl"))
    audit = audit_samples(samples, calls_by_session(folder / "calls.jsonl"))
    assert not audit.problems
    kept = [turn for turn in turns if turn.role == "main"]
    assert audit.num_trained_tokens == sum(len(turn.ids) for turn in kept) > 0
    tokens = json.loads((folder / "tokens.json").read_text())
    assert {str(number) for turn in turns for number in turn.ids} <= set(tokens)
