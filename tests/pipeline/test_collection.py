"""`kat collect FILE`: what may be said in the file, going on where it stopped, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from katcore.cli import app
from katcore.errors import ConfigError
from katcore.inference.bytes import write_byte_tokenizer
from katcore.pipeline.archive import Archive
from katcore.pipeline.collection import load_collection, open_folder
from katcore.schema.codec import read_lines
from katcore.schema.rollout import Rollout
from katcore.schema.sample import Sample
from katcore.trajectory.segments import Segments

SCRIPT = {"name": "scripted", "turns": ["echo hello > hello.txt", "submit"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KATCORE_HOME", str(tmp_path / "home"))
    for name in ("first", "second"):
        for file, text in {
            "task.toml": "[agent]\ntimeout_sec = 60.0\n",
            "instruction.md": "Write the word hello into hello.txt.",
            "environment/Dockerfile": "FROM host\nWORKDIR /repo\n",
            "tests/test.sh": "[ -f /repo/hello.txt ]; echo $((1 - $?)) > /logs/verifier/reward.txt\n",
        }.items():
            path = tmp_path / "tasks" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


def written(folder: Path, **changes: Any) -> Path:
    config = {"tasks": "tasks", "scaffold": "mini", "engine": SCRIPT, "traces": 0} | changes
    path = folder / "try.yaml"
    path.write_text(json.dumps(config))
    return path


def collect(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["collect", *map(str, arguments)])


def test_it_leaves_calls_rollouts_and_samples_and_goes_on(folder: Path) -> None:
    path = written(folder, attempts=2)
    done = collect(path)
    assert done.exit_code == 0, done.output
    made = folder / "home" / "collections" / "try"
    rollouts = list(read_lines(Rollout, made / "rollouts.jsonl"))
    assert sorted((item.task_id, item.attempt) for item in rollouts) == [
        ("first", 0), ("first", 1), ("second", 0), ("second", 1),
    ]  # fmt: skip
    assert {item.reward for item in rollouts} == {1.0}
    assert {item.scaffold for item in rollouts} == {"mini"}
    assert len(list(read_lines(Sample, made / "tree.jsonl"))) == 4
    before = (made / "calls.jsonl").read_bytes()
    again = collect(path)
    assert again.exit_code == 0, again.output
    assert (made / "calls.jsonl").read_bytes() == before
    assert len(list(read_lines(Rollout, made / "rollouts.jsonl"))) == 4


def test_what_was_lost_is_tried_again(folder: Path) -> None:
    path = written(folder, engine={"name": "scripted", "turns": ["echo hello > hello.txt"]})
    done = collect(path, "--name", "other")
    assert done.exit_code == 1
    assert "2 rollouts were lost to infrastructure" in done.output
    made = folder / "home" / "collections" / "other"
    assert {item.reward for item in read_lines(Rollout, made / "rollouts.jsonl")} == {None}
    config = load_collection(written(folder))
    (made / "config.json").write_text(config.model_dump_json())
    done = collect(folder / "try.yaml", "--name", "other")
    assert done.exit_code == 0, done.output
    assert len(list(read_lines(Sample, made / "tree.jsonl"))) == 2


def test_an_engine_that_cannot_be_used_costs_no_rollout(folder: Path) -> None:
    model = write_byte_tokenizer(folder / "model")
    engine = {"name": "vllm", "model": str(model), "url": "http://127.0.0.1:9"}
    done = collect(written(folder, engine=engine))
    assert done.exit_code != 0
    assert "http://127.0.0.1:9 does not answer" in " ".join(str(done.output).split())
    made = folder / "home" / "collections" / "try"
    assert not list(read_lines(Rollout, made / "rollouts.jsonl"))


def test_another_config_needs_another_name(folder: Path) -> None:
    open_folder("a", load_collection(written(folder)))
    other = load_collection(written(folder, attempts=3))
    with pytest.raises(ConfigError, match="made with another config; choose another --name"):
        open_folder("a", other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaffold": "claude"}, "no scaffold named 'claude'; installed: "),
        ({"engine": "gpt"}, "no engine named 'gpt'; installed: "),
        ({"engine": {"name": "transformers"}}, "model"),
        ({"engine": {"name": "transformers", "model": "/nowhere"}}, "/nowhere: no model folder"),
        ({"formatters": ["csv"]}, "no formatter named 'csv'"),
        ({"tasks": "nothing"}, "no split 'train'"),
        ({"attempts": 0}, "attempts: "),
        ({"atempts": 1}, "atempts: "),
        ({"budget": {"max_call": 1}}, "budget.max_call: "),
    ],
)
def test_what_does_not_fit_is_said(folder: Path, changes: dict[str, Any], said: str) -> None:
    done = collect(written(folder, **changes))
    assert done.exit_code == 2
    assert said in done.output.replace("\n", "")


def test_a_file_that_is_not_there_is_said(folder: Path) -> None:
    done = collect(folder / "nothing.yaml")
    assert done.exit_code == 2
    assert "nothing.yaml: cannot be read" in done.output.replace("\n", "")


def test_mlflow_gets_a_run_and_a_trace_of_each_rollout_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from katcore.registry.store import client, experiment_id

    path = written(folder, traces=1)
    for home in ("home", "home", "another"):
        monkeypatch.setenv("KATCORE_HOME", str(folder / home))
        done = collect(path)
        assert done.exit_code == 0, (home, done.output)
        number = experiment_id("collect/try")
        (run,) = client().search_runs([number])
        assert run.data.metrics["passed"] == 2
        assert run.data.metrics["exact_prompt_match_frac"] == 1.0
        (trace,) = client().search_traces(locations=[number])
        spans = trace.data.spans
        assert [span.span_type for span in spans] == ["AGENT", "CHAT_MODEL", "CHAT_MODEL"]
        assert spans[0].name in {"first", "second"}
        (assessment,) = trace.info.assessments
        assert (assessment.name, assessment.value) == ("reward", 1.0)


def test_another_machine_goes_on_from_the_artifacts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = str(folder / "kept")
    done = collect(written(folder, artifacts=artifacts, max_tasks=1))
    assert done.exit_code == 0, done.output
    first = folder / "home" / "collections" / "try"
    monkeypatch.setenv("KATCORE_HOME", str(folder / "elsewhere"))
    done = collect(written(folder, artifacts=artifacts, max_tasks=1))
    assert done.exit_code == 0, done.output
    assert f"1 rollouts were in {artifacts} already" in done.output.replace("\n", "")
    second = folder / "elsewhere" / "collections" / "try"
    for name in ("calls.jsonl", "rollouts.jsonl", "tree.jsonl", "chat.jsonl"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    audit = CliRunner().invoke(app, ["audit", str(second)])
    assert audit.exit_code == 0, audit.output


def test_artifacts_of_another_config_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = str(folder / "kept")
    assert collect(written(folder, artifacts=artifacts, max_tasks=1)).exit_code == 0
    monkeypatch.setenv("KATCORE_HOME", str(folder / "elsewhere"))
    done = collect(written(folder, artifacts=artifacts, attempts=2, max_tasks=1))
    assert done.exit_code == 2
    assert "made with another config (attempts)" in " ".join(done.output.split())


def test_what_artifacts_do_not_take_is_made_up_for(folder: Path) -> None:
    kept = folder / "kept"
    kept.mkdir(mode=0o700)
    path = written(folder, artifacts=str(kept), max_tasks=1)
    (kept / "try").mkdir()
    made = folder / "home" / "collections" / "try"
    archive = Archive(open_folder("try", load_collection(path)), str(kept))
    archive.restore()
    (kept / "try" / "config.json").rename(kept / "config.json")
    (kept / "try").rmdir()
    (kept / "try").write_text("in the way")
    done = collect(path)
    assert done.exit_code == 2, done.output
    (kept / "try").unlink()
    done = collect(path)
    assert done.exit_code == 0, done.output
    (rollout,) = read_lines(Rollout, made / "rollouts.jsonl")
    assert Segments(f"{kept}/try").names() == [rollout.id]


@pytest.mark.parametrize(
    ("artifacts", "said"),
    [
        (
            "nothing://bucket",
            "artifacts: nothing://bucket/try cannot be used: Protocol not known: nothing",
        ),
        ("s3://bucket", "artifacts: s3://bucket/try cannot be used: Install s3fs"),
    ],
)
def test_artifacts_that_cannot_be_are_said(folder: Path, artifacts: str, said: str) -> None:
    done = collect(written(folder, artifacts=artifacts))
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
