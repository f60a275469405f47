"""`kat bench tree` and `kat bench train`: steps of training beside others in the same run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from katcore.cli.bench import AsJson, bar, bench, print_aims, tell
from katcore.cli.common import errors_said, out, own_output

if TYPE_CHECKING:
    from katcore.bench.training import Report as TreeReport
    from katcore.bench.update import Report as UpdateReport

__all__ = ["bench"]
Rounds = Annotated[int, typer.Option(min=1, help="Times that each way is timed, in turn.")]
Hidden = Annotated[int, typer.Option(min=64, help="Width of the model.")]
Layers = Annotated[int, typer.Option(min=1, help="Layers of the model.")]


@bench.command("tree")
def tree(  # noqa: PLR0913 - one argument for each option
    tokens: Annotated[int, typer.Option(min=64, help="Of a tree.")] = 2048,
    rounds: Rounds = 5,
    hidden: Hidden = 320,
    layers: Layers = 8,
    larger: Annotated[  # noqa: FBT002
        bool, typer.Option("--larger", help="Larger trees, too: half an hour more.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="An SVG file: speed over what is shared, and its bound.")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Measure a training step on a token tree, beside the same step on its branches."""
    from katcore.bench import training as measured

    with errors_said():
        settings = measured.Settings(tokens, rounds, hidden, layers, larger)
        with bar(settings.num_parts) as step:
            report = measured.run(settings, step)
        if plot:
            plot.write_text(_picture(report))
        tell(report, _print_tree, as_json=as_json)


@bench.command("train")
def train(
    tokens: Annotated[int, typer.Option(min=1024, help="Of a step without sharing.")] = 4096,
    rounds: Rounds = 5,
    hidden: Hidden = 384,
    layers: Layers = 8,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Measure the tokens a second of a training step, beside TRL's SFTTrainer and GRPOTrainer."""
    with errors_said():
        with own_output():
            from katcore.bench import update as measured

            settings = measured.Settings(tokens, rounds, hidden, layers)
            with bar(settings.num_parts) as step:
                report = measured.run(settings, step)
        tell(report, _print_update, as_json=as_json)


def _print_tree(report: "TreeReport") -> None:
    table = Table(title=f"a step on a tree, {report.model}")
    heads = (
        "flat",
        "tree",
        "POR",
        "tree, s",
        "speedup",
        "of",
        "share",
        "memory",
        "padded",
        "its memory",
        "in parts",
        "held",
    )
    for head in ("shape", *heads):
        table.add_column(head, justify="left" if head == "shape" else "right")
    for row in report.rows:
        table.add_row(
            row.shape,
            str(row.tokens_flat),
            str(row.tokens_tree),
            f"{row.por:.3f}",
            f"{row.tree_s:.2f}",
            f"{row.speedup:.2f}",
            f"{row.flop_bound:.2f}",
            f"{row.bound_fraction:.0%}",
            f"{row.mem_ratio:.2f}",
            f"{row.speedup_padded:.2f}",
            f"{row.mem_ratio_padded:.2f}",
            f"{row.parts_speedup:.2f}",
            f"{row.parts_ratio:.2f}",
        )
    out.print(table)
    print_aims(report.aims, report.machine)


def _picture(report: "TreeReport") -> str:
    from katcore.study.plot import picture

    series = {}
    for shape in dict.fromkeys(row.shape for row in report.rows):
        rows = sorted((row for row in report.rows if row.shape == shape), key=lambda row: row.por)
        if len(rows) > 1:
            series[shape] = [(row.por, row.speedup) for row in rows]
            series[f"theory: flop bound, {shape}"] = [(row.por, row.flop_bound) for row in rows]
            series[f"{shape}, padded"] = [(row.por, row.speedup_padded) for row in rows]
    return picture("times as fast as the branches", series, unit="of the tokens shared")


def _print_update(report: "UpdateReport") -> None:
    table = Table(title=f"a step beside TRL's, {report.model}")
    table.add_column("objective")
    table.add_column("rollouts")
    for head in (
        "flat",
        "tree",
        "ours/s",
        "TRL/s",
        "ratio",
        "sharing",
        "flop bound",
        "losses apart",
    ):
        table.add_column(head, justify="right")
    for row in report.rows:
        table.add_row(
            row.objective,
            row.rollouts,
            str(row.tokens_flat),
            str(row.tokens_tree),
            f"{row.ours_per_s:.0f}",
            f"{row.trl_per_s:.0f}",
            f"{row.ratio:.2f}",
            f"{row.sharing:.2f}",
            f"{row.flop_bound:.2f}",
            f"{row.apart:.1e}",
        )
    out.print(table)
    print_aims(report.aims, report.machine)
