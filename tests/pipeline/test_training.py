"""`kat sft|rl|distill FILE`: one after the other, going on after a kill, and what does not fit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from katcore.cli import app
from katcore.cli.training import EXAMPLES
from katcore.errors import ConfigError, KatError
from katcore.pipeline.lineage import ancestors
from katcore.pipeline.rollouts import RolloutFile
from katcore.pipeline.trained import _lasting, run
from katcore.pipeline.training import CONFIGS, load_training, model_folder, preset_of
from katcore.plugin import Plugins
from katcore.schema.call import Message
from katcore.schema.codec import read_lines
from katcore.schema.rollout import Outcome, Rollout, Trajectory, Turn, Verdict
from katcore.train import checkpoint
from katcore.train.trainer import engine_options
from tests.inference.tiny import CONTEXT, write_tiny_model

SHORT = {"context": CONTEXT, "threads": 1}
AGENT = {"tasks": "tasks", "scaffold": {"name": "mini", "max_turns": 1}}
ROLLOUTS = SHORT | {"max_new_tokens": 4, "concurrency": 4}
SFT = {"model": "base", "rollouts": ["demos.jsonl"], "out": "m/sft", **SHORT}
RL = {"model": "base", "out": "m/rl", **ROLLOUTS, **AGENT}
DISTILL = {
    "model": "base",
    "out": "m/unified",
    "domains": {"shell": AGENT | {"teacher": "m/rl"}},
    **ROLLOUTS,
}
ONCE = {"weighting": "once"}
RL_STEPS = {"steps": 3, "prompts": 2, "group": 2, "epochs": 1, "checkpoint_every": 9}


def demonstration(number: int, reward: float | None = 1.0, token: int = 0) -> Rollout:
    ids = tuple(3 + (number * 7 + at) % 200 for at in range(9)) + (token,) * bool(token)
    turn = Turn(
        -1, 0, 0, ids[:3], ids[3:], (0.0,) * len(ids[3:]), (Message("user", "x"),), "ls", "0"
    )
    name = f"r{number}"
    trajectory = Trajectory(name, (turn,))
    return Rollout(name, name, "d", "g", 0, Outcome.SCORED, trajectory, Verdict(reward))


def write_rollouts(path: Path, rollouts: list[Rollout]) -> None:
    file = RolloutFile(path)
    for one in rollouts:
        file.append(one)
    file.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model, demonstrations, and tasks whose rewards are chance."""
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    write_tiny_model(tmp_path / "base")
    write_rollouts(tmp_path / "demos.jsonl", [demonstration(number) for number in range(6)])
    for name in ("first", "second"):
        for file, text in {
            "task.toml": "[agent]\ntimeout_sec = 60.0\n",
            "instruction.md": "Say ls.",
            "environment/Dockerfile": "FROM host\nWORKDIR /repo\n",
            "tests/test.sh": "echo 0.$(date +%N) > /logs/verifier/reward.txt\n",
        }.items():
            path = tmp_path / "tasks" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


def written(folder: Path, name: str, config: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))
    return path


def kat(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_begins_with_what_the_one_before_made(folder: Path) -> None:
    configs = {
        "sft": SFT | {"sft": {"steps": 3, "batch": 4}},
        "rl": RL | ONCE | {"model": "m/sft", "rl": RL_STEPS | {"steps": 2, "kl": 0.1}},
        "distill": DISTILL
        | ONCE
        | {"model": "m/sft", "distill": {"steps": 2, "prompts": 2, "mean": "domain", "group": 2}},
    }
    outs = {"sft": "sft", "rl": "rl", "distill": "unified"}
    for verb, config in configs.items():
        path = written(folder, verb, config)
        done = kat(verb, path)
        assert done.exit_code == 0, done.output
        model = folder / "m" / outs[verb] / "model"
        assert done.stdout.splitlines()[-1] == str(model)
        assert ancestors(folder / "base") < ancestors(model)
        again = kat(verb, path)
        assert (again.exit_code, "unchanged, skipped" in again.output) == (0, True)
    assert not (folder / "m" / "unified" / "warnings.txt").exists(), (
        "teacher and student are related"
    )
    wanted = {
        "sft": {"loss", "tokens_per_s"},
        "rl": {
            "loss",
            "reward",
            "clip_rate",
            "kl_old",
            "kl",
            "entropy",
            "infra_failed_rate",
            "sampled_per_s",
        },
        "unified": {"kl", "kl/shell", "entropy", "agreement", "reward/shell", "infra_failed_rate"},
    }
    for name, metrics in wanted.items():
        assert metrics <= curve(folder / "m" / name)[-1].keys()
    from katcore.registry.store import client, experiment_id

    (tracked,) = client().search_runs([experiment_id("train/rl")])
    assert tracked.data.metrics["reward"] == pytest.approx(curve(folder / "m" / "rl")[-1]["reward"])
    assert tracked.data.params["rl.group"] == "2"


CHILD = """
import os, signal, sys
from pathlib import Path
from katcore.pipeline.trained import run
from katcore.pipeline.training import CONFIGS, load_training
from katcore.plugin import Plugins
verb, path = sys.argv[1], Path(sys.argv[2])

def show(step, steps, metrics):
    path.with_suffix(".losses").open("a").write(f"{metrics['loss']}\\n")
    if step == 1:
        os.kill(os.getpid(), signal.SIGKILL)

run(path, load_training(path, CONFIGS[verb]), Plugins.installed(), show)
"""


AHEAD = {"serve": {"placement": "disaggregated", "staleness": 1, "replicas": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "serve", "checkpoint_every"),
    [("rl", {}, 9), ("distill", {}, 9), ("rl", AHEAD, 1), ("distill", AHEAD, 9)],
)
def test_after_a_kill_the_losses_are_those_that_would_have_been(
    folder: Path, verb: str, serve: dict[str, Any], checkpoint_every: int
) -> None:
    """Steps since the last checkpoint are taken again, on the rollouts that are on disk."""
    config = RL | {"rl": RL_STEPS | {"checkpoint_every": checkpoint_every}}
    if verb == "distill":
        shell = AGENT | {"teacher": "base"}
        settings = {"objective": "policy-gradient", "rewards": True, "group": 2, "prompts": 2}
        settings |= {"steps": 3, "checkpoint_every": checkpoint_every}
        config = DISTILL | {"domains": {"shell": shell}, "distill": settings}
    path = written(folder, verb, config | serve)
    command = [sys.executable, "-c", CHILD, verb, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = [float(line) for line in path.with_suffix(".losses").read_text().splitlines()]
    losses: list[float] = []
    finished = run(
        path,
        load_training(path, CONFIGS[verb]),
        Plugins.installed(),
        lambda step, steps, metrics: losses.append(metrics["loss"]),
    )
    assert len(before) == 2
    assert all(before)
    # Killed at the end of the second step, before that was saved.
    num_saved = 1 if checkpoint_every == 1 else 0
    assert losses[: 2 - num_saved] == before[num_saved:]
    assert len(losses) == 3 - num_saved
    for row in curve(finished.path):
        assert 0 <= row["staleness_mean"] <= row["staleness_max"] <= (1 if serve else 0)
        assert 0 <= row["trainer_idle"] <= 1
        assert 0 <= row["engine_idle"] <= 1
    rollouts = list(read_lines(Rollout, finished.path / "rollouts.jsonl"))
    assert len(rollouts) == len(
        {(one.id.split(".")[0], one.task_id, one.attempt) for one in rollouts}
    )
    assert len(rollouts) == 12


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["rl", "distill"])
def test_what_takes_long_between_steps_keeps_no_agent_waiting(
    folder: Path, verb: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next step's rollouts are being made; asyncio in debug mode says how long their loop stood still."""
    monkeypatch.setenv("PYTHONASYNCIODEBUG", "1")
    write, slept = checkpoint.write, []

    def write_slowly(*given: Any) -> None:
        if "write" not in slept:
            time.sleep(4)
        slept.append("write")
        write(*given)

    def show(step: int, steps: int, metrics: Any) -> None:
        if step == 0:
            time.sleep(4)
            slept.append("show")

    monkeypatch.setattr(checkpoint, "write", write_slowly)
    config = RL | {"rl": RL_STEPS | {"steps": 2, "checkpoint_every": 1}}
    if verb == "distill":
        shell = AGENT | {"teacher": "base"}
        settings = {"steps": 2, "prompts": 2, "checkpoint_every": 1}
        config = DISTILL | {"domains": {"shell": shell}, "distill": settings}
    path = written(folder, verb, config | AHEAD)
    with caplog.at_level("WARNING", "asyncio"):
        run(path, load_training(path, CONFIGS[verb]), Plugins.installed(), show)
    assert set(slept) == {"show", "write"}
    said = re.findall(r"Executing .* took ([\d.]+) seconds", caplog.text)
    assert max(map(float, said), default=0.0) < 3.5


@pytest.mark.parametrize(
    ("verb", "changes", "said"),
    [
        ("sft", {"model": "nowhere"}, "nowhere: no model in "),
        ("sft", {"modle": "base"}, "modle: Extra inputs"),
        ("sft", {"rollouts": []}, "rollouts: "),
        ("sft", {"rollouts": ["nothing"]}, "nothing: no such file"),
        ("sft", {"sft": {"step": 1}}, "sft.step: Extra inputs"),
        ("sft", {"sft": {"lr": "fast"}}, "sft.lr: "),
        ("sft", {"formatter": "chat"}, "'chat' makes no token trees"),
        ("sft", {"formatter": "csv"}, "no formatter named 'csv'; installed: "),
        ("sft", {"rollouts": ["failed.jsonl"]}, "none of 0 samples"),
        ("sft", {"rollouts": ["other.jsonl"]}, "token 299999 is none of the model's "),
        ("sft", {"out": "base"}, "is there already, and no output of kat"),
        ("rl", {"tasks": "nothing"}, "no split 'train'"),
        ("rl", {"scaffold": "claude"}, "no scaffold named 'claude'; installed: "),
        ("rl", {"verifier": "judge"}, "no verifier named 'judge'; installed: "),
        ("rl", {"rl": {"correction": "truncate"}}, "set old: trainer"),
        ("rl", {"rl": {"tasks": "unseen"}}, "name a folder of such tasks"),
        ("rl", {"weighting": "once", "rl": {"level": "sequence"}}, "set weighting: path"),
        ("sft", {"balance": 0.1, "lora": {}}, "set balance: 0"),
        ("sft", {"weighting": "twice"}, "weighting: Input should be 'path' or 'once'"),
        ("rl", {"model": "models:/kat-none@candidate"}, "no model is registered"),
        ("distill", {"domains": {}}, "domains: "),
        ("distill", {"domains": {"a": {"tasks": "tasks"}}}, "domains.a.teacher: Field required"),
        ("distill", {"distill": {"group": 1}}, "objective: policy-gradient, and group: 2"),
        ("distill", {"distill": {"truncate_after": 2}}, "set overlap_k, too"),
        ("distill", {"distill": {"cold_steps": 1}}, "give domains.shell.rollouts"),
        ("distill", {"domains": {"shell": AGENT | {"teacher": "foreign"}}}, "need one tokenizer"),
    ],
)
def test_what_does_not_fit_is_said(
    folder: Path, verb: str, changes: dict[str, Any], said: str
) -> None:
    write_rollouts(folder / "failed.jsonl", [demonstration(0, 0.0)])
    write_rollouts(folder / "other.jsonl", [demonstration(0, token=299_999)])
    foreign = shutil.copytree(folder / "base", folder / "foreign") / "tokenizer_config.json"
    foreign.write_text(foreign.read_text().replace("assistant|>", "helper|>"))
    config = {"sft": SFT, "rl": RL, "distill": DISTILL}[verb] | changes
    if verb == "distill" and config["domains"] == DISTILL["domains"]:
        config["domains"] = {"shell": AGENT | {"teacher": "base"}}
    path = written(folder, verb, config)
    with pytest.raises(KatError) as caught:
        run(path, load_training(path, CONFIGS[verb]), Plugins.installed())
    assert said in " ".join(str(caught.value).split())


def test_what_others_said_is_read_by_the_model_s_own_tokenizer(folder: Path) -> None:
    other = demonstration(0, reward=None, token=299_999)
    write_rollouts(folder / "other.jsonl", [other])
    config = SFT | {"rollouts": ["other.jsonl"], "take": "all", "ids": "new", "sft": {"steps": 1}}
    path = written(folder, "sft", config)
    done = run(path, load_training(path, CONFIGS["sft"]), Plugins.installed())
    assert done.metrics["num_samples"] == 1


def test_another_config_needs_another_out(folder: Path) -> None:
    path = written(folder, "sft", SFT | {"sft": {"steps": 1}})
    run(path, load_training(path, CONFIGS["sft"]), Plugins.installed())
    path = written(folder, "sft", SFT | {"sft": {"steps": 2}})
    with pytest.raises(ConfigError, match="made with another config; choose another `out`"):
        run(path, load_training(path, CONFIGS["sft"]), Plugins.installed())


def test_what_changes_no_result_may_change_on_the_way() -> None:
    content = {
        "model": "base",
        "threads": 2,
        "concurrency": 8,
        "micro_batch_tokens": 4096,
        "scale": {"processes": 2, "recompute": False, "gpu": ""},
        "rl": {"lr": 1e-4, "checkpoint_every": 10},
    }
    wanted = {"model": "base", "scale": {"processes": 2}, "rl": {"lr": 1e-4}}
    assert _lasting(content) == wanted
    # The load-balancing loss is over micro-batches.
    balanced = {"balance": 0.001, "micro_batch_tokens": 4096}
    assert _lasting(content | balanced) == wanted | balanced


def test_after_too_little_memory_a_training_goes_on_with_less(folder: Path) -> None:
    """Steps are those of a training that had it from the beginning, up to rounding."""

    def config(out: str, **changes: Any) -> Path:
        settings = {"steps": 4, "batch": 4, "checkpoint_every": changes.pop("every", 50)}
        return written(folder, out, SFT | {"out": f"m/{out}", "sft": settings} | changes)

    def trained(path: Path, stop_at: int | None = None) -> list[float]:
        losses = []

        def show(step: int, steps: int, metrics: Any) -> None:
            losses.append(metrics["loss"])
            if step == stop_at:
                raise MemoryError

        run(path, load_training(path, CONFIGS["sft"]), Plugins.installed(), show)
        return losses

    whole = trained(config("whole"))
    with pytest.raises(MemoryError):
        trained(config("cut", every=1), stop_at=2)
    less = {"micro_batch_tokens": 16, "scale": {"recompute": True, "gpu": "8GiB"}, "every": 3}
    assert trained(config("cut", **less)) == pytest.approx(whole[2:], rel=1e-4)
    assert trained(config("cut")) == [], "it is done"
    with pytest.raises(ConfigError, match="made with another config"):
        trained(config("cut", seed=1))


def test_a_registered_model_is_found_by_version_and_alias(folder: Path) -> None:
    from katcore.registry.models import register

    register("kat-x", folder / "base", {"katcore.key": "k"}, ["candidate"])
    for uri in ("models:/kat-x/1", "models:/kat-x@candidate"):
        assert model_folder(uri, folder) == folder / "base"
    with pytest.raises(ConfigError, match="of: models:/kat-x"):
        model_folder("models:/kat-y/1", folder)


@pytest.mark.parametrize("verb", CONFIGS)
def test_how_trees_are_computed_is_said_as_in_a_preset(folder: Path, verb: str) -> None:
    said = {"tree": "required", "weighting": "once", "balance": 0.25}
    config = {"sft": SFT, "rl": RL, "distill": DISTILL}[verb] | said
    preset = preset_of("x", load_training(written(folder, verb, config), CONFIGS[verb]))
    assert said.items() <= preset.model_dump().items()
    options = engine_options(preset)
    assert (options["trees"], options["weighting"], options["balance"]) == tuple(said.values())


@pytest.mark.parametrize("verb", EXAMPLES)
def test_the_example_of_the_help_fits(tmp_path: Path, verb: str) -> None:
    path = tmp_path / "example.yaml"
    path.write_text("\n".join(EXAMPLES[verb]))
    assert load_training(path, CONFIGS[verb]).out.name
    said = kat(verb, "--help").output
    assert EXAMPLES[verb][0].partition("#")[0].strip() in said
