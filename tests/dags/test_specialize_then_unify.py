"""The DAG has the stages of the plan, its form has the choices, and parsing it is cheap."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from katcore.config import Preset, environment, preset_names
from katcore.pipeline.plan import Plan, build_plan
from katcore.plugin import Plugins
from katcore.service.layout import dags_folder

FILE = dags_folder() / "specialize_then_unify.py"
PARSE = """
import importlib.util, json, sys, time
from airflow import sdk
sdk.DAG, sdk.Param, sdk.TaskGroup, sdk.task, sdk.get_current_context
started = time.process_time()
spec = importlib.util.spec_from_file_location("parsed", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
seconds = time.process_time() - started
dag = module.DAG
print(json.dumps({
    "seconds": seconds,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "dag_id": dag.dag_id,
    "schedule": dag.schedule,
    "limits": [dag.max_active_tasks, dag.max_active_runs],
    "tasks": {name: sorted(task.upstream_task_ids) for name, task in dag.task_dict.items()},
    "rules": {name: str(getattr(task.trigger_rule, "value", task.trigger_rule))
              for name, task in dag.task_dict.items()},
    "teardowns": sorted(name for name, task in dag.task_dict.items() if task.is_teardown),
    "retries": sorted({task.retries for task in dag.task_dict.values()}),
    "params": {name: {"default": param.value, **param.schema} for name, param in module.PARAMS.items()},
}))
"""


@pytest.fixture(scope="module")
def dag(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("airflow")
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(FILE)],
        env={**environment(), "AIRFLOW_HOME": str(home), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    parsed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return parsed


@pytest.fixture(scope="module")
def plan() -> Plan:
    return build_plan(Preset(name="any", summary=""), Plugins.installed())


def test_tasks_and_dependencies_are_the_plans(dag: dict[str, Any], plan: Plan) -> None:
    assert dag["dag_id"] == "specialize_then_unify"
    assert dag["schedule"] is None
    stages = {name: found for name, found in dag["tasks"].items() if name != "reap_sandboxes"}
    assert stages == {name: sorted(spec.inputs) for name, spec in plan.stages.items()}


def test_what_killed_stages_left_is_reclaimed_after_the_last_ones(
    dag: dict[str, Any], plan: Plan
) -> None:
    assert dag["teardowns"] == ["reap_sandboxes"]
    read = {source for spec in plan.stages.values() for source in spec.inputs}
    assert dag["tasks"]["reap_sandboxes"] == sorted(set(plan.stages) - read)
    assert dag["rules"]["reap_sandboxes"] == "all_done_setup_success"


def test_parsing_is_cheap(dag: dict[str, Any]) -> None:
    logging.getLogger(__name__).info("parsed in %.2f CPU-s", dag["seconds"])
    assert not {"torch", "transformers", "mlflow"}.intersection(dag["modules"])
    assert dag["seconds"] < 4


def test_two_stages_of_one_run_at_once_and_one_more_try(dag: dict[str, Any]) -> None:
    assert dag["limits"] == [2, 1]
    assert dag["retries"] == [1]


def test_an_expert_that_was_not_chosen_does_not_hold_up_the_unified_model(
    dag: dict[str, Any], plan: Plan
) -> None:
    for name, spec in plan.stages.items():
        is_joining = bool(spec.inputs) and not spec.expert
        assert dag["rules"][name] == (
            "none_failed_min_one_success" if is_joining else "all_success"
        )


def test_the_form_offers_what_is_installed(dag: dict[str, Any], plan: Plan) -> None:
    params = dag["params"]
    assert params["preset"]["enum"] == list(preset_names())
    assert params["preset_file"]["default"] is None
    assert params["experts"]["examples"] == list(plan.experts)
    assert params["experts"]["default"] == list(plan.experts)
    assert params["experts"]["items"]["enum"] == list(plan.experts)
    assert params["seed"]["type"] == "integer"


@pytest.mark.parametrize(
    ("name", "value", "is_fine"),
    [
        ("preset", "nano", True),
        ("preset", "no-such", False),
        ("preset", "nano; rm -rf /", False),
        ("preset", "--help", False),
        ("preset_file", None, True),
        ("preset_file", "/some/where/mine.yaml", True),
        ("preset_file", "mine.yaml", False),
        ("preset_file", "/some/where/mine.txt", False),
        ("experts", [], False),
        ("experts", ["no-such"], False),
        ("seed", 0, True),
        ("seed", -1, False),
        ("seed", "1", False),
    ],
)
def test_what_the_form_refuses(
    dag: dict[str, Any], name: str, value: object, *, is_fine: bool
) -> None:
    schema = {key: entry for key, entry in dag["params"][name].items() if key != "default"}
    assert jsonschema.Draft7Validator(schema).is_valid(value) is is_fine


def test_the_dag_file_imports_only_airflow_and_what_is_cheap() -> None:
    imported = {
        line.split()[1].partition(".")[0]
        for line in Path(FILE).read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imported <= {"airflow", "katcore", "re", "datetime", "contextlib", "typing"}
