"""`kat study`: what a method does, measured where the answer is known."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from katcore.cli.bench import bar, numbers, tell
from katcore.cli.common import errors_said, out, say
from katcore.config import home

if TYPE_CHECKING:
    from katcore.study.mcla import Report

study = typer.Typer(
    no_args_is_help=True, help="Studies of a method, on models small enough for a CPU."
)


@study.callback()
def _group() -> None:
    """A group of studies, be it of one."""


@study.command("mcla")
def mcla(
    seeds: Annotated[str, typer.Option(help="Of the runs, joined by commas.")] = "0,1,2",
    steps: Annotated[int, typer.Option(min=1, help="Of each run.")] = 60,
    base_steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning before all runs.")] = 60,
    ways: Annotated[
        str, typer.Option(help="To handle noise, joined by commas; all if empty.")
    ] = "",
    to: Annotated[
        Path | None, typer.Option(help="Folder; study/ in katcore's home if empty.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,  # noqa: FBT002
) -> None:
    """Measure what averaging log-probabilities does for a tiny mixture of experts, and reinforce it.

    Some forty minutes of one core. Runs that are done stay in the folder, and the same command goes on with
    those that are left; to use several cores, give each a seed, then ask for all.
    """
    from katcore.study import mcla as measured
    from katcore.study.race import Shape
    from katcore.study.show import curves, pictures

    with errors_said():
        settings = measured.Settings(
            seeds=numbers(seeds, "--seeds", least=0),
            base_steps=base_steps,
            ways=tuple(way.strip() for way in ways.split(",") if way.strip()) or measured.ALL_WAYS,
            shape=Shape(steps=steps),
        )
        folder = to or home() / "study"
        with bar(settings.num_steps) as step:
            report = asyncio.run(measured.run(settings, step, folder / "runs"))
        (folder / "mcla.json").write_text(json.dumps(report.as_json()))
        (folder / "mcla.html").write_text(pictures(report))
        for name, drawn in curves(report).items():
            (folder / f"mcla-{name}.svg").write_text(drawn)
        tell(report, _print, as_json=as_json)
        say(f"{folder / 'mcla.json'}, and pictures in {folder / 'mcla.html'} and beside it")


def _print(report: "Report") -> None:
    noise = Table(title="noise of one pass, and of means, against float32")
    for head in ("source", "variance", "common", "estimated", "gap", "bias of draws", "K"):
        noise.add_column(head)
    for head in ("mean square", "theory", "clips turns", "estimated"):
        noise.add_column(head, justify="right")
    for found in report.noises:
        first = (
            found.name,
            f"{found.variance:.2g}",
            f"{found.common:.3f}",
            f"{found.common_estimated:.3f}",
            f"{found.gap:.2g}",
            f"{found.sampled_bias:+.2g}",
        )
        for number, row in enumerate(found.rows):
            left = (f"{row.mean_square:.3g}", f"{row.theory:.3g}")
            rates = (f"{row.clipped:.1%}", f"{row.estimated:.1%}")
            head_cells = first if not number else ("",) * len(first)
            noise.add_row(*head_cells, str(row.passes), *left, *rates)
        noise.add_section()
    out.print(noise)
    table = Table(title=f"reward of runs; before them {report.base_greedy:.3f} greedy")
    for head in ("engine", "way", "last fifth", "learnt", "by seed", "greedy", "clipped"):
        table.add_column(head)
    for cells in report.rows():
        table.add_row(*cells)
    out.print(table)
    _calm, *noisy = dict.fromkeys(run.entry.source for run in report.runs)
    for source in noisy:
        say(f"{source}: {report.verdict(source)}")
