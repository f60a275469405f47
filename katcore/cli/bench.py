"""`kat bench`: figures beside a baseline in the same run. Slow is no failure; a lost answer is."""

import asyncio
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from katcore.cli.common import err, errors_said, out, say
from katcore.config import home
from katcore.errors import ConfigError
from katcore.plugin import Plugins

if TYPE_CHECKING:
    from katcore.bench.aim import Aim
    from katcore.bench.fleet import Report as FleetReport
    from katcore.bench.proxy import Report as ProxyReport
    from katcore.bench.sandbox import Report as SandboxReport
    from katcore.bench.trajectories import Report as TrajectoriesReport

bench = typer.Typer(
    no_args_is_help=True, help="Benchmarks, each beside a baseline in the same run."
)
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
Streams = Annotated[str, typer.Option(help="Numbers of concurrent streams, joined by commas.")]
Requests = Annotated[
    int,
    typer.Option(
        min=1, help="Of each route at each number of streams; at least 3 of a stream in a round."
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Times that all routes are measured, in turn.")]
Delay = Annotated[float, typer.Option(min=0, help="How long the mock takes to answer.")]
Whole = Annotated[bool, typer.Option("--whole", help="Whole answers instead of streams.")]
Litellm = Annotated[
    Path | None,
    typer.Option(
        help="Environment that has LiteLLM's proxy; by default one is made in katcore's home."
    ),
]
NoLitellm = Annotated[bool, typer.Option("--no-litellm", help="Leave LiteLLM out.")]


@bench.command("proxy")
def proxy(  # noqa: PLR0913 - a command has as many options as it has
    streams: Streams = "1,16,64,256,1024",
    requests: Requests = 1000,
    rounds: Rounds = 2,
    delay_ms: Delay = 0.0,
    whole: Whole = False,  # noqa: FBT002
    litellm: Litellm = None,
    no_litellm: NoLitellm = False,  # noqa: FBT002
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Measure what the proxy adds to a call, beside the mock alone and LiteLLM; 1 if an answer is lost."""
    from katcore.bench import proxy as measured

    with errors_said():
        program = None if no_litellm else _litellm(litellm)
        settings = measured.Settings(
            streams=numbers(streams, "--streams"),
            requests=requests,
            rounds=rounds,
            delay_ms=delay_ms,
            is_streamed=not whole,
            litellm=program,
        )
        with bar(settings.num_runs) as step:
            report = asyncio.run(measured.run(settings, home() / "bench", say, step))
        tell(report, _print_proxy, as_json=as_json)
        raise typer.Exit(int(not report.is_lossless))


@bench.command("trajectories")
def trajectories(
    calls: Annotated[int, typer.Option(min=1, help="Calls of the tree.")] = 1000,
    turns: Annotated[int, typer.Option(min=1, help="Turns of the logs whose size is taken.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Times that all calls are written.")] = 3,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Measure what recording costs, how large a log is, and how long its tree takes to build."""
    from katcore.bench import trajectories as measured

    with errors_said():
        settings = measured.Settings(calls, turns, rounds)
        with bar(settings.num_parts) as step:
            report = asyncio.run(measured.run(settings, home() / "bench", step))
        tell(report, _print_trajectories, as_json=as_json)


@bench.command("sandbox")
def sandbox(
    backends: Annotated[str, typer.Option(help="Joined by commas.")] = "local",
    dockerfile: Annotated[
        Path | None, typer.Option(help="What all of them start from; the machine's own if empty.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Numbers of starts at once.")] = "1,8,32",
    starts: Annotated[int, typer.Option(min=1, help="At each of these numbers.")] = 200,
    hold: Annotated[int, typer.Option(min=1, help="How many are held at once.")] = 1000,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Measure starts, rates and memory of backends, beside bare clone and exec; 1 if one does not answer."""
    from katcore.bench import sandbox as measured

    with errors_said():
        settings = measured.Settings(
            tuple(filter(None, backends.split(","))),
            dockerfile.read_text() if dockerfile else measured.DOCKERFILE,
            numbers(concurrency, "--concurrency"),
            starts,
            hold,
        )
        with bar(settings.num_parts) as step:
            installed = Plugins.installed()
            report = asyncio.run(measured.run(settings, home() / "bench", installed, step))
        tell(report, _print_sandbox, as_json=as_json)
        raise typer.Exit(int(not report.is_sound))


@bench.command("fleet")
def fleet(
    sandboxes: Annotated[int, typer.Option(min=1, help="All asked for at once.")] = 50_000,
    nodes: Annotated[int, typer.Option(min=1, help="With room for half of them.")] = 100,
    lost: Annotated[int, typer.Option(min=0, help="Nodes that go when half are done.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn by chance.")] = 0,
    as_json: AsJson = False,  # noqa: FBT002
) -> None:
    """Simulate a fleet behind the real scheduler; 1 if a rollout is lost or a node gets too many."""
    from katcore.bench import fleet as measured

    with errors_said():
        if lost >= nodes:
            raise ConfigError(f"--lost {lost}: of {nodes} nodes, one at least has to stay")
        settings = measured.Settings(sandboxes, nodes, lost, seed=seed)
        report = measured.run(settings, home() / "bench")
        tell(report, _print_fleet, as_json=as_json)
        raise typer.Exit(int(not report.is_sound))


class Report(Protocol):
    """What a benchmark found."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""


ReportT = TypeVar("ReportT", bound=Report)


def tell(report: ReportT, show: Callable[[ReportT], None], *, as_json: bool) -> None:
    """On standard output, for machines or for people."""
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        show(report)


def _litellm(given: Path | None) -> Path:
    from katcore.bench.litellm import ensure, find

    return find(given) if given else ensure(home() / "bench", say)


def numbers(text: str, option: str, *, least: int = 1) -> tuple[int, ...]:
    """What an option lists. Raises ConfigError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < least:
        raise ConfigError(
            f"{option} {text!r}: numbers from {least} on are needed, joined by commas"
        )
    return found


@contextmanager
def bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that says which part is at work; each part told moves it on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # It is drawn seldom: what is measured has the same cores.
    with Progress(*columns, console=err, refresh_per_second=2) as bar:
        shown = bar.add_task("starting", total=total, completed=-1)

        def step(what: str) -> None:
            bar.update(shown, description=what, advance=1)

        yield step
        bar.update(shown, description="done", completed=total)


def _print_proxy(report: "ProxyReport") -> None:
    table = Table(title="latency to the last byte, ms; requests/s")
    heads = (
        "streams",
        "route",
        "p50",
        "p95",
        "p99",
        "added p50",
        "p95",
        "p99",
        "bare fsync",
        "requests/s",
    )
    for head in (*heads, "of direct", "lost"):
        table.add_column(head, justify="left" if head == "route" else "right")
    for row in report.rows:
        for name, found in row.routes.items():
            times = [found.ms_p50, found.ms_p95, found.ms_p99]
            if name == "direct":
                added: list[float | None] = [None] * 3
            else:
                added = [row.added(name, at) for at in ("ms_p50", "ms_p95", "ms_p99")]
            share = f"{found.rps / row.rps_direct:.0%}" if row.rps_direct else ""
            cells = map(_ms, (*times, *added, found.fsync_ms_p50))
            table.add_row(
                str(row.streams), name, *cells, f"{found.rps:.0f}", share, str(found.lost)
            )
        table.add_section()
    out.print(table)
    for row in report.rows:
        for name, found in row.routes.items():
            for reason, num in found.why.items():
                say(f"{row.streams} streams, {name}: {num} lost: {reason}")
    beside = f"; LiteLLM {report.litellm}" if report.litellm else ""
    print_aims(report.aims, report.machine + beside)


def _print_trajectories(report: "TrajectoriesReport") -> None:
    table = Table(title="writing calls")
    for head in (
        "calls at once",
        "fsync",
        "calls/s",
        "GB/s",
        "bare calls/s",
        "bare GB/s",
        "of bare",
    ):
        table.add_column(head, justify="right")
    for item in report.written:
        table.add_row(
            str(item.writers),
            "yes" if item.is_synced else "no",
            f"{item.calls_per_s:.0f}",
            f"{item.gb_per_s:.4f}",
            f"{item.bare_calls_per_s:.0f}",
            f"{item.bare_gb_per_s:.4f}",
            f"{item.calls_per_s / item.bare_calls_per_s:.0%}",
        )
    out.print(table)
    built = report.built
    facts: dict[str, Any] = {
        "calls": built.turns,
        "roles": ", ".join(f"{num} {role}" for role, num in built.roles.items()),
        "tokens in the log, in the tree": f"{built.tokens}, {built.tree_tokens}",
        "read the log, s": f"{built.read_s:.3f}",
        "build the trajectory, s": f"{built.build_s:.3f}",
        "build the token tree, s": f"{built.tree_s:.3f}",
        "peak memory, MiB": f"{built.peak_mib:.0f}",
        "log, MB": f"{built.log_bytes / 1e6:.1f}",
    }
    out.print(_facts("the tree of one session", facts.items()))
    logs = Table(title=f"logs of {report.logged[0].turns} turns, kB")
    for head in ("dialect", "sent", "unique", "of it text", "log", "log / unique", "log / text"):
        logs.add_column(head, justify="left" if head == "dialect" else "right")
    for one in report.logged:
        sizes = (one.sent_bytes, one.unique_bytes, one.text_bytes, one.log_bytes)
        over_text = one.log_bytes / one.text_bytes
        kilobytes = (f"{size / 1e3:.0f}" for size in sizes)
        logs.add_row(one.dialect, *kilobytes, f"{one.ratio:.2f}", f"{over_text:.2f}")
    out.print(logs)
    print_aims(report.aims, report.machine)


def _print_sandbox(report: "SandboxReport") -> None:
    table = Table(title="from asking to the end of the first command, ms; starts/s")
    heads = ("backend", "at once", "cold p50", "p95", "warm p50", "p95", "starts/s", "of bare")
    for head in heads:
        table.add_column(head, justify="left" if head == "backend" else "right")
    for name, found in report.backends.items():
        for level in found.levels:
            times = (level.cold_ms_p50, level.cold_ms_p95, level.warm_ms_p50, level.warm_ms_p95)
            share = f"{level.starts_per_s / report.floor_per_s:.0%}"
            rate = f"{level.starts_per_s:.0f}"
            table.add_row(name, str(level.concurrency), *map(_ms, times), rate, share)
        table.add_section()
    out.print(table)
    for name, found in report.backends.items():
        if found.held:
            held = found.held
            facts: dict[str, Any] = {
                "alive, answering, with a door": f"{held.alive}, {held.answering}, {held.doors}",
                "memory of each, MiB, idle; and when asked": f"{held.mib_each}; {held.mib_asked}",
                "seconds to open them, for a thousand": f"{held.seconds}, {held.seconds_1000}",
                "stopped by": held.why or "nothing",
            }
            out.print(_facts(f"{name}: many at once", facts.items()))
        if found.error:
            say(f"{name}: {found.error}")
    say(f"bare clone and exec: {report.floor_per_s:.0f} a second")
    print_aims((), report.machine)


def _print_fleet(report: "FleetReport") -> None:
    waits = Table(title="seconds of virtual time")
    for head in ("", "p50", "p95", "most"):
        waits.add_column(head)
    for what, spread in (
        ("a sandbox waits", report.wait),
        ("a task's sandboxes wait, on average", report.group_wait),
        ("from a task's first start to its last", report.group_span),
        ("from the loss of a node to running again", report.recovery),
    ):
        waits.add_row(what, f"{spread.p50:.1f}", f"{spread.p95:.1f}", f"{spread.most:.1f}")
    out.print(waits)
    ledger = report.ledger
    facts: dict[str, Any] = {
        "all of it, virtual s": report.virtual_s,
        "done, given up": f"{report.done}, {report.given_up}",
        "open at once": report.most_open,
        "of what a node may have, at most": f"{report.most_of_a_node:.0%}",
        "evicted": report.evicted,
        "failures": ", ".join(f"{num} {name}" for name, num in report.failures.items()) or "none",
        "ledger: transactions, rows": f"{ledger.transactions}, {ledger.rows}",
        "ledger: s in all, ms each (p50, most)": f"{ledger.seconds}, {ledger.ms_p50}, {ledger.ms_most}",
        "CPU for each that was placed, us": report.scheduling_us,
    }
    out.print(_facts("the fleet", facts.items()))
    print_aims((), report.machine)


def print_aims(aims: "Iterable[Aim]", machine: str) -> None:
    """What should be, and where it was found."""
    table = Table(title="aims")
    for head in ("", "found", "aim", "met"):
        table.add_column(head)
    for aim in aims:
        met = "[green]yes[/]" if aim.is_met else "[bold red]no[/]"
        table.add_row(aim.what, f"{aim.found:.3g}", aim.wanted, met)
    if table.row_count:
        out.print(table)
    out.print(machine, markup=False, highlight=False)


def _facts(title: str, facts: Iterable[tuple[str, Any]]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in facts:
        table.add_row(name, str(value))
    return table


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
