"""The command line: `kat <verb>`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from katcore.cli import capture, images, sandbox, training
from katcore.cli.bench_training import bench
from katcore.cli.common import errors_said, out, own_output, say
from katcore.cli.study import study
from katcore.config import Preset, load_preset, preset_names
from katcore.plugin import Plugins

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Specialize experts on feedback from real sandboxes, then unify them into one model.",
)

PresetName = Annotated[
    str, typer.Option("--preset", help=f"{', '.join(preset_names())}, or a YAML file.")
]
Experts = Annotated[str, typer.Option(help="Experts of the run, joined by commas; all if empty.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**31 - 1, help="Seed of data, training and sampling.")
]
Expert = Annotated[str, typer.Option(help="The expert of this stage; empty: the unified model.")]


def _plan(preset: str, experts: str, seed: int) -> tuple[Any, Preset, Plugins]:
    from katcore.pipeline.plan import build_plan

    settings, plugins = load_preset(preset), Plugins.installed()
    names = [name.strip() for name in experts.split(",") if name.strip()]
    return build_plan(settings, plugins, experts=names, seed=seed), settings, plugins


def _stage_command(stage: str, summary: str) -> Callable[..., None]:
    def command(
        preset: PresetName = "nano", expert: Expert = "", experts: Experts = "", seed: Seed = 0
    ) -> None:
        from katcore.pipeline import gpus, launch
        from katcore.pipeline.local import stage_command
        from katcore.pipeline.plan import UNIFIED
        from katcore.pipeline.stage import run_stage

        with errors_said():
            plan, settings, plugins = _plan(preset, experts, seed)
            name = stage if stage == "base" else f"{expert or UNIFIED}.{stage}"
            if stage == "evaluate" and expert:
                # Only the gate waits for it; the run waits for the distillation beside it.
                os.nice(10)
            if stage in training.EXAMPLES and launch.is_needed(settings.scale):
                with gpus.alone(settings, stage, say):
                    launch.launch(stage_command(plan, name, preset)[3:], settings.scale)
                return
            with own_output(), gpus.alone(settings, stage, say):
                done = run_stage(plan, name, plugins)
            say(f"{name}: {'unchanged, skipped' if done.is_skipped else 'done'}")
            typer.echo(done.path.as_uri())

    command.__doc__ = summary
    return command


_STAGES = {
    "base": "Make the model that every expert and the student start from.",
    "synthesize": "Make an expert's tasks.",
    "collect": "Replay demonstrations through sandbox, proxy and verifier.",
    "sft": "Fine-tune on verified demonstrations.",
    "rl": "Reinforce an expert on its own rollouts.",
    "distill": "Fuse the experts into the student, on its own rollouts.",
    "evaluate": "Measure pass rates on held-out tasks.",
    "gate": "Judge the whole run.",
    "register": "Make a version in the model registry.",
}


def _training_command(stage: str, summary: str) -> Callable[..., None]:
    def command(
        config: Annotated[
            Path | None, typer.Argument(help="A training's YAML; without it, the stage.")
        ] = None,
        preset: PresetName = "nano",
        expert: Expert = "",
        experts: Experts = "",
        seed: Seed = 0,
    ) -> None:
        if config is None:
            _stage_command(stage, summary)(preset, expert, experts, seed)
        else:
            training.train(stage, config)

    command.__doc__ = summary
    return command


for _name, _summary in _STAGES.items():
    if _name in training.EXAMPLES:
        _help = f"{_summary} With a file: the same, on models, rollouts and tasks of yours."
        _file = "\n\n".join(("A file:", *training.EXAMPLES[_name]))
        app.command(_name, help=_help, epilog=_file, rich_help_panel="Stages")(
            _training_command(_name, _summary)
        )
    elif _name != "collect":
        app.command(_name, help=_summary, rich_help_panel="Stages")(_stage_command(_name, _summary))


@app.command(rich_help_panel="Stages")
def collect(
    config: Annotated[
        Path | None, typer.Argument(help="A collection's YAML; without it, the stage.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the collection; its file's by default.")] = "",
    preset: PresetName = "nano",
    expert: Expert = "",
    experts: Experts = "",
    seed: Seed = 0,
) -> None:
    """Replay demonstrations through sandbox, proxy and verifier; or run any scaffold on tasks of yours."""
    if config is None:
        _stage_command("collect", "")(preset, expert, experts, seed)
    else:
        capture.collect(config, name or config.stem)


app.add_typer(capture.scaffolds, name="scaffolds")
app.add_typer(sandbox.sandbox, name="sandbox")
app.add_typer(images.images, name="images")
app.add_typer(bench, name="bench")
app.add_typer(study, name="study")
app.command()(capture.proxy)
app.command("format")(capture.formatted)
app.command("import")(capture.imported)


@app.command()
def train(  # noqa: PLR0913 - one argument for each option
    config: Annotated[
        Path | None,
        typer.Argument(help="A preset's name or YAML, or a training's; instead of --preset."),
    ] = None,
    preset: PresetName = "nano",
    experts: Experts = "",
    seed: Seed = 0,
    dry_run: Annotated[  # noqa: FBT002
        bool, typer.Option("--dry-run", help="Only say what would be started, and if it fits.")
    ] = False,
    gpu: Annotated[
        str,
        typer.Option(help="A card's name or memory, such as H100 or 80GiB; scale.gpu if empty."),
    ] = "",
    model: Annotated[
        str,
        typer.Option(help="For --dry-run: a folder, config.json or known name of another model."),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Of --dry-run.")] = False,  # noqa: FBT002
) -> None:
    """Run all stages of a preset, or a training's file; --dry-run: commands, memory of each GPU, tokens.

    A dry run that does not fit exits with 1, and says which part, by how much, and what would fit.
    """
    from katcore.cli import dry_run as shows
    from katcore.pipeline import dry_run as dry

    with errors_said():
        verb = shows.training_verb(config) if config else ""
    if not dry_run:
        if config and verb:
            training.train(verb, config)
            return
        pipeline(str(config or preset), experts, seed)
        return

    with errors_said():
        source = str(config or preset)
        if config and verb:
            asked = dry.asked_of_file(config, verb, model)
        else:
            plan, settings, _ = _plan(source, experts, seed)
            asked = dry.asked_of_preset(settings, source, plan.experts, model)
        found = dry.dry_run(asked, gpu)
    shows.shown(found, as_json=as_json)


@app.command()
def pipeline(preset: PresetName = "nano", experts: Experts = "", seed: Seed = 0) -> None:
    """Run all stages without Airflow; goes on where an earlier run stopped."""
    from katcore.pipeline import local, watch

    with errors_said():
        plan, _, _ = _plan(preset, experts, seed)
        with watch.Watch(plan, out) as shown:
            local.run_all(plan, preset, shown.tick)
        _finish(plan)


@app.command()
def run(preset: PresetName = "nano", experts: Experts = "", seed: Seed = 0) -> None:
    """Run all stages through Airflow; starts and stops it if it is not up."""
    from katcore.pipeline import watch
    from katcore.service import drive

    with errors_said():
        plan, _, _ = _plan(preset, experts, seed)
        with watch.Watch(plan, out) as shown:
            drive.run(plan, preset, shown.tick, say)
        _finish(plan)


@app.command()
def up(
    port: Annotated[int, typer.Option(help="Of Airflow; the next free one if it is taken.")] = 8080,
    mlflow_port: Annotated[int, typer.Option(help="Of MLflow; the same.")] = 5000,
) -> None:
    """Start Airflow and MLflow in the background, on loopback."""
    from katcore.service import control

    with errors_said():
        for line in control.where(control.up(port, mlflow_port, say)):
            say(line)
        say("stop them with `kat down`")


@app.command()
def down() -> None:
    """Stop what `kat up` started, and all that it left."""
    from katcore.service import control

    with errors_said():
        count = control.down()
        say(f"stopped ({count} processes)" if count else "nothing to stop")


@app.command()
def report(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,  # noqa: FBT002
) -> None:
    """Print the last run's table again."""
    from katcore.pipeline import table

    with errors_said():
        found = table.last_report()
        if as_json:
            typer.echo(json.dumps(found))
        else:
            _print(found)


@app.command()
def view(
    path: Annotated[
        Path, typer.Argument(help="A file of rollouts, or a folder with a rollouts.jsonl.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the pages; view/ beside the file or beside stages/ if empty."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="The first so many rollouts; 0: all.")] = 0,
) -> None:
    """Write a page for each rollout, down to its tokens, to read offline; prints where."""
    from katcore.pipeline.view import write_views

    with errors_said():
        typer.echo(write_views(path, out, limit=limit))


@app.command()
def audit(
    path: Annotated[
        Path | None, typer.Argument(help="A folder with calls.jsonl and samples.jsonl.")
    ] = None,
    calls: Annotated[Path | None, typer.Option(help="The call log, where elsewhere.")] = None,
    samples: Annotated[Path | None, typer.Option(help="The samples, where elsewhere.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,  # noqa: FBT002
) -> None:
    """Prove from the call log that samples train what was sampled, and nothing else; 1 if they do not."""
    from katcore.pipeline import audit as proof

    with errors_said():
        found = proof.audit_files(*proof.files_of(path, calls, samples))
        if as_json:
            typer.echo(json.dumps(proof.as_json(found)))
        else:
            out.print(proof.as_table(found))
        if found.violation:
            say(f"not borne out by the call log: {found.violation}")
            raise typer.Exit(1)


@app.command()
def plugins() -> None:
    """List what is installed: offers and experts, and who supplies them."""
    with errors_said():
        table = Table()
        for column in ("kind", "name", "plugin", "summary"):
            table.add_column(column)
        for item in Plugins.installed().everything():
            table.add_row(item.kind, item.name, item.plugin, item.summary)
        out.print(table)


def _finish(plan: Any) -> None:
    from katcore.pipeline import table

    table.remember(plan)
    found = table.last_report()
    _print(found)
    if not found["gate"]["held"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    from katcore.pipeline import table

    out.print(table.pass_rates(found))
    out.print(table.checks(found))
    for line in table.where_to_look(found):
        out.print(line, markup=False, soft_wrap=True)


def main() -> None:
    """Run `kat`."""
    app()
