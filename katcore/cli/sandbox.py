"""Verbs for sandboxes on record: list them, reclaim what killed processes left, kill some."""

import asyncio
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from katcore.cli.common import errors_said, out, say
from katcore.errors import ConfigError, SandboxError
from katcore.plugin import Plugins

if TYPE_CHECKING:
    from katcore.sandbox.ledger import Ledger
    from katcore.schema.task import SandboxSpec

sandbox = typer.Typer(
    no_args_is_help=True, help="Sandboxes on record, and what killed processes left of theirs."
)
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
_COLUMNS = ("id", "state", "age", "backend", "serves", "run", "work", "host", "holder")


@sandbox.command("list")
def list_sandboxes(as_json: AsJson = False) -> None:  # noqa: FBT002
    """List the sandboxes that are open, or that killed processes left."""
    with errors_said():
        found = _found()
        if as_json:
            typer.echo(json.dumps(found))
            return
        table = Table()
        for column in _COLUMNS:
            table.add_column(column)
        for item in found["sandboxes"]:
            table.add_row(*(str(item[column]) for column in _COLUMNS))
        if found["sandboxes"]:
            out.print(table)
        else:
            say("no sandbox is open")
        if found["dead"]:
            say(
                f"of dead processes, something may be left of {len(found['dead'])}: `kat sandbox reap`"
            )


@sandbox.command()
def reap(
    run: Annotated[str, typer.Option(help="Only what this scheduled run left.")] = "",
    every: Annotated[
        float | None, typer.Option(min=1, help="Go on, once in so many seconds.")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Destroy what dead processes left; nothing of living ones. Exit code 1 if something stays."""
    from katcore.sandbox import reaper
    from katcore.sandbox.ledger import Ledger

    with errors_said():
        ledger, plugins = Ledger(), Plugins.installed()
        while every is not None:
            _reap_and_say(ledger, plugins)
            time.sleep(every)
        done = asyncio.run(reaper.reap(ledger, plugins, run=run or None))
        if as_json:
            typer.echo(json.dumps(asdict(done)))
        else:
            say(f"reclaimed {done.leases} sandboxes of {done.holders} dead processes")
            for line in done.left:
                say(f"left: {line}")
        if done.left:
            raise typer.Exit(1)


@sandbox.command()
def kill(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Of `kat sandbox list`, or how they begin.")
    ] = None,
    is_all: Annotated[bool, typer.Option("--all", help="All that are on record.")] = False,  # noqa: FBT002
) -> None:
    """Destroy sandboxes, also of living processes: their rollouts fail, unrewarded, and are repeated."""
    from katcore.sandbox import reaper
    from katcore.sandbox.ledger import Ledger

    with errors_said():
        if bool(ids) == is_all:
            raise ConfigError("say which: the ids of some sandboxes, or --all")
        num = asyncio.run(reaper.kill(Ledger(), Plugins.installed(), ids or ()))
        say(f"destroyed {num} sandboxes")


@sandbox.command()
def manifest(
    task: Annotated[Path, typer.Argument(help="A task directory.")],
    backend: Annotated[str, typer.Option(help="The backend's name.")] = "kubernetes",
    options: Annotated[str, typer.Option(help="Its options, as a YAML or JSON mapping.")] = "{}",
) -> None:
    """Print what a backend would have its cluster make for a task. Nothing is made or built."""
    import yaml

    from katcore.dataset.harbor import read_task
    from katcore.protocols import SupportsManifest

    with errors_said():
        try:
            given = yaml.safe_load(options)
        except yaml.YAMLError as error:
            raise ConfigError(f"--options is no YAML: {error}") from error
        if not isinstance(given, dict):
            raise ConfigError(
                "--options has to be a mapping, such as '{registry: registry.test/x}'"
            )
        made = Plugins.installed().make("sandbox", backend, given)
        if not isinstance(made, SupportsManifest):
            raise ConfigError(f"the sandboxes of {backend!r} are no objects of a cluster")
        typer.echo(asyncio.run(_manifest(made, read_task(task).sandbox)))


async def _manifest(backend: Any, spec: "SandboxSpec") -> str:
    try:
        return str(await backend.manifest(spec))
    finally:
        await backend.close()


def _reap_and_say(ledger: "Ledger", plugins: Plugins) -> None:
    """A database that is away for a while is no reason to end."""
    from katcore.sandbox import reaper

    try:
        done = asyncio.run(reaper.reap(ledger, plugins))
    except SandboxError as error:
        say(f"not reaped: {error}")
        return
    if done.holders or done.leases or done.left:
        say(f"reclaimed {done.leases} sandboxes of {done.holders} dead processes")
    for line in done.left:
        say(f"left: {line}")


def _found() -> dict[str, list[Any]]:
    """All that is on record. Of each sandbox: whether its holder is `alive` or `dead`."""
    from katcore.sandbox import reaper
    from katcore.sandbox.ledger import Ledger

    holders, leases, now_s = Ledger().read()
    dead = {holder.id for holder in holders if reaper.is_dead(holder, now_s)}
    by_id = {holder.id: holder for holder in holders}
    sandboxes = []
    for lease in leases:
        holder = by_id[lease.holder]
        sandboxes.append(
            {
                "id": lease.id,
                "state": lease.state,
                "age": f"{max(0, now_s - lease.opened_s):.0f} s",
                "backend": holder.backend,
                "serves": lease.serves,
                "run": holder.run,
                "work": holder.work,
                "host": holder.host,
                "holder": "dead" if holder.id in dead else "alive",
                "process": holder.process,
                "handle": lease.handle,
            }
        )
    return {"sandboxes": sandboxes, "dead": sorted(dead)}
