"""Verbs of the capture layer: collect with any scaffold, check scaffolds, serve the proxy alone."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from katcore.cli.common import err, errors_said, out, say
from katcore.errors import ConfigError
from katcore.plugin import Plugins

if TYPE_CHECKING:
    from katcore.pipeline.collection import CollectionConfig, Tally
    from katcore.pipeline.scaffold_check import Cell

scaffolds = typer.Typer(
    no_args_is_help=True, help="Coding agents: install them, and see them work."
)
_MARKS = {True: "[green]yes[/]", False: "[bold red]no[/]", None: "n/a"}


def collect(path: Path, name: str) -> None:
    """Run a collection's scaffold on its tasks, with a bar that says what became of them."""
    from katcore.pipeline import collection

    with errors_said():
        config = collection.load_collection(path)
        folder = collection.open_folder(name, config)
        tally = asyncio.run(_collect(folder, config))
        out.print(_summary(tally))
        say(f"{folder}")
        if tally and tally.lost:
            say(
                f"{tally.lost} rollouts were lost to infrastructure; the same command tries them again"
            )
            raise typer.Exit(1)


async def _collect(folder: Path, config: "CollectionConfig") -> "Tally | None":
    from katcore.pipeline import collection

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[outcomes]}"),
        console=err,
    )
    tally = None
    with bar:
        shown = bar.add_task(config.scaffold.name, outcomes="")
        async for tally in collection.run(folder, config, Plugins.installed(), say):
            outcomes = f"{tally.passed} passed, {tally.failed} failed, {tally.lost} lost"
            bar.update(shown, total=tally.total, completed=tally.done, outcomes=outcomes)
    return tally


def _summary(tally: "Tally | None") -> Table:
    table = Table()
    for column in (
        "rollouts",
        "passed",
        "failed",
        "lost",
        "calls",
        "exact prompts",
        "turns by role",
    ):
        table.add_column(column)
    if tally:
        exact = 1 - tally.inexact / max(1, tally.calls)
        roles = ", ".join(f"{num} {role}" for role, num in sorted(tally.roles.items()))
        numbers = (tally.done, tally.passed, tally.failed, tally.lost, tally.calls)
        table.add_row(*map(str, numbers), f"{exact:.1%}", roles)
    return table


@scaffolds.command("list")
def list_scaffolds() -> None:
    """List the scaffolds that are offered, and by which plugin."""
    with errors_said():
        table = Table()
        for column in ("name", "plugin", "summary"):
            table.add_column(column)
        for item in Plugins.installed().everything():
            if item.kind == "scaffold":
                table.add_row(item.name, item.plugin, item.summary)
        out.print(table)


Names = Annotated[
    list[str] | None, typer.Argument(help="Scaffolds, as NAME or NAME@VERSION; by default all.")
]


@scaffolds.command("install")
def install(names: Names = None) -> None:
    """Install scaffolds that run in the sandbox, once for all rollouts."""
    from katcore.protocols import RunsInside

    with errors_said():
        plugins = Plugins.installed()
        for name, version in _chosen(plugins, names):
            scaffold = plugins.make("scaffold", name, {"version": version} if version else {})
            if isinstance(scaffold, RunsInside):
                done = asyncio.run(scaffold.install(say))
                say(f"{name} {done.version}: {done.tools}")


@scaffolds.command("check")
def check(
    names: Names = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,  # noqa: FBT002
) -> None:
    """Run scaffolds for real against scripted answers; exit code 1 if a cell fails."""
    from katcore.pipeline.scaffold_check import check as check_one

    with errors_said():
        plugins = Plugins.installed()
        cells: list[Cell] = []
        for name, version in _chosen(plugins, names):
            options = {"version": version} if version else {}
            cells += asyncio.run(check_one(plugins, name, options, say))
    if as_json:
        typer.echo(json.dumps([asdict(cell) for cell in cells]))
    else:
        out.print(_matrix(cells))
        for cell in cells:
            if cell.why:
                say(f"{cell.scaffold} {cell.version}, {cell.column}: {cell.why}")
    raise typer.Exit(int(any(cell.ok is False for cell in cells)))


def _chosen(plugins: Plugins, names: list[str] | None) -> list[tuple[str, str]]:
    """Names and versions; by default of all scaffolds that need no configuration."""
    given = names or [name for name in plugins.names("scaffold") if name != "command"]
    chosen = [(name, version) for name, _, version in (item.partition("@") for item in given)]
    for name, _ in chosen:
        plugins.find("scaffold", name)
        if name == "command":
            raise ConfigError("`command` is what its configuration says; check it by `kat collect`")
    return chosen


def _matrix(cells: "list[Cell]") -> Table:
    table = Table()
    table.add_column("scaffold")
    columns = list(dict.fromkeys(cell.column for cell in cells))
    for column in columns:
        table.add_column(column, justify="center")
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        rows.setdefault(f"{cell.scaffold} {cell.version}".strip(), {})[cell.column] = _MARKS[
            cell.ok
        ]
    for name, row in rows.items():
        table.add_row(name, *(row[column] for column in columns))
    return table


def proxy(
    config: Annotated[
        Path, typer.Argument(help="YAML with `engine`, and `sampling` and `budget`.")
    ],
    port: Annotated[int, typer.Option(help="On loopback; 0 takes a free one.")] = 8822,
    log: Annotated[Path, typer.Option(help="Where calls are recorded.")] = Path("calls.jsonl"),
) -> None:
    """Serve the LLM proxy alone, with one session; prints its URL and key."""
    from katcore.pipeline import proxy_alone

    with errors_said():
        asyncio.run(proxy_alone.serve(config, port, log, say))


def formatted(
    name: Annotated[str, typer.Argument(help="A formatter, as `kat plugins` lists them.")],
    paths: Annotated[
        list[Path], typer.Argument(help="Files of rollouts, or folders with a rollouts.jsonl.")
    ],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE, the value as YAML.")
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="By default NAME.jsonl beside the first; - prints.")
    ] = None,
) -> None:
    """Put rollouts into another form: chat messages, token rows, ATIF, ..."""
    from katcore.pipeline.recorded import format_rollouts

    with errors_said():
        options = dict(_option(text) for text in option or ())
        target, num = format_rollouts(paths, name, options, out_file, Plugins.installed())
        say(f"{num} rows in {target}")


def imported(
    kind: Annotated[str, typer.Argument(help="atif, claude-code, opencode or verifiers.")],
    paths: Annotated[list[Path], typer.Argument(help="The files.")],
    out_file: Annotated[Path, typer.Option("--out", help="The file of rollouts to write.")] = Path(
        "rollouts.jsonl"
    ),
) -> None:
    """Make rollouts of sessions that others recorded."""
    from katcore.pipeline.recorded import import_sessions

    with errors_said():
        say(f"{import_sessions(kind, paths, out_file)} rollouts in {out_file}")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"option {text!r}: write it as NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"option {text!r}: its value is not YAML: {error}") from error
