"""`kat train --dry-run`: commands, memory and refusals of presets and of training files."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kat_engines.config import VllmConfig, _own_server
from katcore import config
from katcore.budget.card import CARDS, GIB, find_card
from katcore.budget.shape import known_models
from katcore.cli import app
from katcore.cli.dry_run import training_verb
from katcore.config import load_preset, preset_names
from katcore.pipeline.commands import launched, server_lines
from katcore.pipeline.dry_run import asked_of_preset, dry_run
from katcore.settings import ScaleSettings

PRESETS = Path(config.__file__).parent / "presets"
SMALL = """
summary: small
model: {kind: hub, repo: Qwen/Qwen2.5-Coder-0.5B-Instruct,
  revision: 0123456789abcdef0123456789abcdef01234567, context: 8192}
micro_batch_tokens: 16384
"""


def kat(*words: str) -> Result:
    return CliRunner().invoke(app, ["train", "--dry-run", *words])


def record(*words: str) -> dict[str, Any]:
    done = kat("--json", *words)
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (0 if found["fits"] else 1), done.output
    return found


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_fits_what_it_is_for(name: str) -> None:
    found = record("--preset", name)
    assert found["fits"]
    assert [one["stage"] for one in found["stages"]] == ["base", "sft", "rl", "distill", "evaluate"]


def test_a_run_on_a_cpu_needs_no_card() -> None:
    done = kat("--preset", "nano")
    assert "912,512 parameters" in done.output
    assert "rl, node 0: kat rl --preset nano --expert swe" in done.stdout
    assert "no GPU is named, so nothing was refused" in done.output


def test_what_cannot_fit_is_refused_with_what_would(small: Path) -> None:
    done = kat(str(small), "--gpu", "RTX4090")
    assert done.exit_code == 1
    assert "does not fit: sft, updating weights: " in done.output
    assert "GiB too much for RTX4090, most of it activations" in done.output
    assert "would fit: scale: {recompute: true" in done.output


def test_each_change_that_it_names_does_fit_and_nothing_less_would(small: Path) -> None:
    asked = asked_of_preset(load_preset(str(small)), str(small), ("swe", "terminal"))
    report = dry_run(asked, "RTX4090")
    assert report.changes
    sizes = {
        sum(len(v) if isinstance(v, dict) else 1 for v in one.values()) for one in report.changes
    }
    for number, change in enumerate(report.changes):
        content = load_preset(str(small)).model_dump()
        for section, values in change.items():
            own = content[section]
            content[section] = own | values if isinstance(own, dict) else values
        path = small.with_name(f"changed-{number}.yaml")
        path.write_text(json.dumps(content))
        assert record(str(path), "--gpu", "RTX4090")["fits"], change
    assert max(sizes) <= 4


def test_the_card_of_the_settings_is_the_default(small: Path) -> None:
    small.write_text(f"{SMALL}scale: {{gpu: L4}}\n")
    assert record(str(small))["gpu"] == {"name": "L4", "bytes": CARDS["l4"].memory}
    assert record(str(small), "--gpu", "96GiB")["gpu"] == {"name": "96GiB", "bytes": 96 * GIB}


def test_a_table_has_the_sums_of_its_parts(small: Path) -> None:
    stages = record(str(small), "--gpu", "80GiB")["stages"]
    sft = next(one for one in stages if one["stage"] == "sft")
    done = kat(str(small), "--gpu", "80GiB")
    assert f"{sum(sft['update'].values()) / GIB:.2f}" in done.stdout
    room = find_card("80GiB").memory
    assert sum(sft["update"].values()) < room


def test_other_models_can_be_asked_about(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(known_models()["Qwen/Qwen3-8B"]))
    for model in ("Qwen/Qwen3-8B", str(config), str(tmp_path)):
        found = record("--preset", "laptop", "--model", model)
        assert found["parameters"]["total"] == 8_190_735_360
    assert "the shape of 'org/none' is not known here" in kat("--model", "org/none").output


def test_a_context_is_at_most_the_models(small: Path) -> None:
    small.write_text(SMALL.replace("8192}", "40000}"))
    done = kat(str(small))
    assert done.exit_code == 2
    assert "40000 tokens are more than the 32768 of the model" in done.output


def test_a_trainings_file_is_one_stage(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, content in (
        ("config.json", json.dumps(known_models()["Qwen/Qwen3-8B"])),
        ("tokenizer_config.json", "{}"),
    ):
        (tmp_path / "model" / name).write_text(content)
    file = tmp_path / "one.yaml"
    file.write_text("{model: model, rollouts: [r], out: out, scale: {processes: 2, zero: 3}}")
    (stage,) = record(str(file), "--gpu", "H200")["stages"]
    assert stage["stage"] == "sft"
    (line,) = stage["commands"]["node 0"]
    assert line == f"kat sft {file}"


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("{summary: x}", ""),
        ("{out: x, rollouts: [r]}", "sft"),
        ("{out: x, tasks: t}", "rl"),
        ("{out: x, domains: {}}", "distill"),
    ],
)
def test_files_are_told_apart(tmp_path: Path, text: str, verb: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    assert training_verb(tmp_path / "file.yaml") == verb


def test_a_preset_may_be_named_as_a_file_is() -> None:
    assert record("gpu8")["stages"] == record("--preset", "gpu8")["stages"]
    result = CliRunner().invoke(app, ["train", "gpu9", "--dry-run"])
    assert result.exit_code == 2
    assert "no preset of that name; there are cluster, gpu8" in " ".join(result.stderr.split())


def test_several_machines_meet_by_torchrun() -> None:
    line = shlex.join(launched(ScaleSettings(processes=8, nodes=2), ["sft", "x.yaml"]))
    assert line.startswith("torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d")
    assert line.endswith(" -m katcore.cli sft x.yaml")
    # On one machine kat starts the processes itself.
    assert launched(ScaleSettings(processes=8), ["sft", "x.yaml"]) == ["kat", "sft", "x.yaml"]


def test_servers_are_started_as_the_engine_starts_them(tmp_path: Path) -> None:
    """The line is the one of the engine's own server, but for model, interpreter and port."""
    (tmp_path / "config.json").write_text("{}")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    preset = load_preset("gpu8")
    for number, line in enumerate(server_lines(preset, "rl")):
        options = {
            "model": tmp_path,
            "python": python,
            "context": preset.model.context,
            "tensor_parallel_size": preset.serve.tensor_parallel,
            "devices": tuple(range(4 * number, 4 * number + 4)),
            "seed": number,
            "adapter_rank": 32,
            "sleeps": True,
            **preset.serve.options,
        }
        start = _own_server(VllmConfig.model_validate(options))._start
        command = shlex.join(start.command(8000 + number)).replace(str(python), "python")
        command = command.replace(str(tmp_path), "/MODEL").replace(tmp_path.name, "MODEL")
        given = start.environment("key")
        names = (
            "VLLM_SERVER_DEV_MODE",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            "CUDA_VISIBLE_DEVICES",
        )
        assert line == " ".join([*(f"{name}={given[name]}" for name in names), command])


def test_servers_elsewhere_are_to_be_started_there() -> None:
    lines = list(server_lines(load_preset("cluster"), "evaluate"))
    assert all("--tensor-parallel-size 4" in line for line in lines)
    assert len(lines) == 4
    assert "--host rollout-3 --port 8000" in lines[3]
    assert "--enable-sleep-mode" not in lines[3]
    trained = list(server_lines(load_preset("cluster"), "rl"))
    assert trained == lines, "one server for all stages"
    said = kat("--preset", "cluster").stdout
    assert f"rl, distill, evaluate, to be started: {lines[0]}\n" in said
    assert said.count(lines[0]) == 1


def test_what_each_machine_runs_is_said_once() -> None:
    said = kat("--preset", "cluster").stdout
    assert "sft, nodes 0 to 3: torchrun --nnodes 4 " in said
    assert "node 1" not in said
    assert "evaluate, node 0: kat evaluate --preset cluster --expert swe\n" in said
    assert "evaluate, node 0: kat evaluate --preset cluster\n" in said


def test_servers_of_an_evaluation_take_no_weights_and_never_sleep() -> None:
    (line, _) = server_lines(load_preset("gpu8"), "evaluate")
    assert line.startswith("CUDA_VISIBLE_DEVICES=0,1,2,3 python")
    assert "DEV_MODE" not in line
    assert "lora" not in line
    assert "sleep" not in line


def test_an_evaluation_in_one_process_is_refused_where_the_model_is_larger_than_a_card(
    tmp_path: Path,
) -> None:
    path = tmp_path / "big.yaml"
    served = "serve: {engine: vllm, tensor_parallel: 8}"
    text = SMALL.replace("Qwen2.5-Coder-0.5B-Instruct", "Qwen3-Coder-30B-A3B-Instruct")
    scale = (
        "scale: {processes: 8, zero: 3, precision: bfloat16, device: cuda, gpu: H100}\nlora: {}\n"
    )
    path.write_text(text + scale)
    assert "does not fit: evaluate, making rollouts: " in kat(str(path)).output
    path.write_text(text + scale + served)
    assert "does not fit: evaluate" not in kat(str(path)).output


def test_servers_for_adapters_elsewhere_cannot_be_evaluated_with(small: Path) -> None:
    serve = "serve: {engine: vllm, placement: disaggregated, urls: [http://a:1]}\nlora: {}\n"
    small.write_text(SMALL + serve)
    done = kat(str(small))
    assert done.exit_code == 2
    assert "evaluate has the servers at serve.urls read whole models" in done.output


def changed(path: Path, old: str, new: str, name: str = "gpu8") -> Path:
    """A preset with one thing changed, in a file."""
    text = (PRESETS / f"{name}.yaml").read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "num"),
    [
        ("summary", "summary", 8),
        ("replicas: 2", "replicas: 4", 16),
        ("replicas: 2", "replicas: 2\n  placement: disaggregated", 16),
        ("replicas: 2", "replicas: 2\n  devices: [0, 1, 2, 3, 8, 9, 10, 11]", 12),
    ],
)
def test_it_says_how_many_gpus_a_machine_has_to_have(
    tmp_path: Path, old: str, new: str, num: int
) -> None:
    path = changed(tmp_path / "p.yaml", old, new)
    assert record(str(path))["gpus"] == num
    assert f"a machine has to have {num} GPUs" in kat(str(path)).output
    assert "fits H100" in kat(str(path)).output


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "tensor_parallel: 4",
            "tensor_parallel: 3",
            "3 GPUs cannot share the model's 32 attention heads",
        ),
        ('"0.3"', '"1.5"', "'1.5' is no share of a card"),
    ],
)
def test_servers_that_would_not_start_are_refused(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    done = kat(str(changed(tmp_path / "p.yaml", old, new)))
    assert done.exit_code == 2
    assert said in done.output


def test_more_than_a_machine_s_gpus_are_those_of_more_machines(tmp_path: Path) -> None:
    path = changed(tmp_path / "p.yaml", "nodes: 4", "nodes: 1", "cluster")
    assert {"scale": {"nodes": 2}} not in record(str(path))["changes"]
    assert {"scale": {"nodes": 4}} in record(str(path))["changes"]


def test_a_card_that_nothing_would_use_is_pointed_out() -> None:
    assert "would use no GPU" in kat("--preset", "laptop", "--gpu", "24GiB").output
    assert "would use no GPU" not in kat("--preset", "gpu8").output
