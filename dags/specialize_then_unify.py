"""All stages of a run as one DAG: specialize each expert, then unify them.

The tasks and their dependencies are those of `katcore.pipeline.plan`; each runs `kat <stage>`. What the form
chooses is checked by the parameters' JSON schemas, and reaches the command as an argument list: no shell.
"""

from contextlib import nullcontext
from datetime import timedelta
from typing import Any

from airflow import sdk
from airflow.sdk.exceptions import AirflowSkipException

from katcore.config import Preset, preset_names
from katcore.pipeline import child
from katcore.pipeline.plan import Plan, StageSpec, build_plan
from katcore.plugin import Plugins

# Which stages there are and what each reads is the same for every preset.
PLAN = build_plan(Preset(name="any", summary="Only for the shape of the DAG."), Plugins.installed())
PRESETS = preset_names()

PARAMS = {
    "preset": sdk.Param(
        "nano" if "nano" in PRESETS else PRESETS[0],
        type="string",
        enum=list(PRESETS),
        title="Preset",
        description="All settings of the run but those below.",
    ),
    "experts": sdk.Param(
        list(PLAN.experts),
        type="array",
        title="Experts",
        description="Those to specialize and unify; the others are skipped.",
        items={"type": "string", "enum": list(PLAN.experts)},
        examples=list(PLAN.experts),
        minItems=1,
        uniqueItems=True,
    ),
    "seed": sdk.Param(
        0,
        type="integer",
        title="Seed",
        description="Of data, training and sampling.",
        minimum=0,
        maximum=2**31 - 1,
    ),
    "preset_file": sdk.Param(
        None,
        type=["null", "string"],
        title="Preset file",
        description="Instead of the preset: the absolute path of a YAML file.",
        pattern=r"^/[^\x00]+\.ya?ml$",
    ),
}


@sdk.task
def run_stage(stage_id: str, expert: str) -> str:
    """Run one stage; its URI is the XCom."""
    context = sdk.get_current_context()
    params = context["params"]
    if expert and expert not in params["experts"]:
        raise AirflowSkipException(f"expert {expert} was not chosen for this run")
    preset = params["preset_file"] or params["preset"]
    plan = child.chosen_plan(preset, params["experts"], params["seed"])
    return child.run_child(plan, stage_id, preset, context["run_id"])


@sdk.teardown
def reap_sandboxes() -> None:
    """Reclaim the sandboxes that stages left which were killed. Runs whatever became of the stages."""
    child.reap_run(sdk.get_current_context()["run_id"])


def make_task(spec: StageSpec) -> Any:
    """The task of a stage. Where experts meet, those that were not chosen are no obstacle."""
    is_joining = spec.inputs and not spec.expert
    rule = "none_failed_min_one_success" if is_joining else "all_success"
    # Of what could start, an expert's evaluation comes last: nothing but the gate waits for it.
    is_urgent = not (spec.expert and spec.stage in {"evaluate", "register"})
    task = run_stage.override(
        task_id=spec.stage,
        trigger_rule=rule,
        weight_rule="absolute",
        priority_weight=2 if is_urgent else 1,
    )
    return task(stage_id=spec.id, expert=spec.expert)


def make_tasks(plan: Plan) -> None:
    """All tasks: `base`, a group for each expert and one for the unified model; then the teardown."""
    made: dict[str, Any] = {}
    groups: dict[str, Any] = {"": nullcontext()}
    for spec in plan.stages.values():
        name = spec.id.rpartition(".")[0]
        if name not in groups:
            groups[name] = sdk.TaskGroup(group_id=name)
        with groups[name]:
            made[spec.id] = make_task(spec)
        for source in spec.inputs:
            made[source] >> made[spec.id]
    read = {source for spec in plan.stages.values() for source in spec.inputs}
    [made[name] for name in plan.stages if name not in read] >> reap_sandboxes()


with sdk.DAG(
    dag_id="specialize_then_unify",
    schedule=None,
    params=PARAMS,
    max_active_runs=1,
    max_active_tasks=2,
    default_args={"retries": 1, "retry_delay": timedelta(seconds=10)},
    is_paused_upon_creation=False,
    tags=["katcore"],
    doc_md=__doc__,
) as DAG:
    make_tasks(PLAN)
