"""The last run's table, for people."""

import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from katcore.config import home
from katcore.errors import StageError
from katcore.pipeline.gate import COLUMNS, number
from katcore.pipeline.page import write_page
from katcore.pipeline.plan import UNIFIED, Plan
from katcore.pipeline.stage import stage_path

LAST = "last-run.json"
REPORT = "report"


def last_report() -> dict[str, Any]:
    """What the gate of the last finished run wrote, with its models.

    Raises:
        StageError: no run has reached its gate yet, or its folder was removed.
    """
    path = home() / LAST
    if not path.exists():
        raise StageError(f"no finished run in {home()}; start one with `kat run` or `kat pipeline`")
    pointer = json.loads(path.read_bytes())
    written = Path(pointer["gate"]) / "report.json"
    if not written.exists():
        raise StageError(f"{written} was removed; `kat run` or `kat pipeline` makes it again")
    report: dict[str, Any] = json.loads(written.read_bytes())
    report["models"] = pointer["models"]
    return report


def remember(plan: Plan) -> None:
    """Note a finished run as the last one, and write its pages."""
    models = {}
    for name in (*plan.experts, UNIFIED):
        version = json.loads((stage_path(plan, f"{name}.register") / "version.json").read_bytes())
        models[version["name"]] = version["version"]
    gate = stage_path(plan, f"{UNIFIED}.gate")
    content = {"gate": str(gate), "models": models}
    temporary = home() / f"{LAST}.tmp"
    temporary.write_text(json.dumps(content))
    temporary.replace(home() / LAST)
    write_page(gate, home() / REPORT, models)


def where_to_look(report: dict[str, Any]) -> list[str]:
    """Lines that say where the details are."""
    models = ", ".join(f"{name} v{version}" for name, version in report["models"].items())
    return [
        f"registered models: {models}",
        f"page with curves and rollouts: {home() / REPORT / 'index.html'}",
        f"curves and models: MLflow, whose address `kat up` prints (data in {home()}/mlflow.db)",
        f"rollouts: {home()}/stages/*/*/rollouts.jsonl",
    ]


def pass_rates(report: dict[str, Any]) -> Table:
    """Greedy pass rate with its interval, and the sampled one below it."""
    table = Table(
        title=escape(
            f"Pass rate on held-out tasks (preset {report['preset']}, seed {report['seed']})"
        )
    )
    table.add_column("domain")
    for column in COLUMNS:
        table.add_column(column.upper() if column in {"sft", "rl"} else column, justify="right")
    for name, domain in report["domains"].items():
        table.add_row(f"{name} (n={domain['base']['n']})", *(_cell(domain[c]) for c in COLUMNS))
        sampled = [f"{100 * domain['sampled'][column]['rate']:.1f}" for column in COLUMNS]
        num = domain["sampled"]["base"]["n"]
        table.add_row(f"  sampled (n={num})", *sampled, style="dim")
    return table


def checks(report: dict[str, Any]) -> Table:
    """The gate, condition by condition."""
    table = Table(title=f"Gate: {'held' if report['gate']['held'] else 'NOT held'}")
    for column in ("domain", "what", "value", "95 % interval", "wanted", ""):
        table.add_column(column)
    for check in report["gate"]["checks"]:
        table.add_row(
            check["domain"],
            check["what"],
            number(check["value"]),
            f"{number(check['low'])} .. {number(check['high'])}",
            check["wanted"],
            "held" if check["held"] else "[bold red]not held[/]",
        )
    return table


def _cell(rate: dict[str, float]) -> str:
    return f"{100 * rate['rate']:.1f} [dim]({100 * rate['low']:.1f}..{100 * rate['high']:.1f})[/]"
