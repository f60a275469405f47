"""The last run as static HTML pages: no script, nothing loaded from elsewhere.

A pure function of the stages' folders: from the gate's, along the inputs that the manifests name.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from katcore.pipeline import browse
from katcore.pipeline.chart import curve, escape, interval
from katcore.pipeline.document import document, table, write
from katcore.pipeline.gate import COLUMNS, number
from katcore.pipeline.plan import UNIFIED
from katcore.pipeline.progress import CURVE

_CURVES = (
    "loss", "reward", "kl", "kl_old", "clip_rate", "entropy", "tokens_per_s", "infra_failed_rate",
)  # fmt: skip
_FROM_ZERO = ("reward", "clip_rate", "tokens_per_s", "infra_failed_rate")


@dataclass(frozen=True, slots=True)
class _Stage:
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.manifest["id"])


def write_page(gate: Path, out: Path, models: Mapping[str, str]) -> Path:
    """Write `out/index.html` and a page of rollouts per expert for the run that `gate` judged.

    `gate` is the gate's finished folder; `models` the registered versions by name. Returns the index.
    """
    stages = {stage.id: stage for stage in _stages(gate)}
    report: dict[str, Any] = json.loads((gate / "report.json").read_bytes())
    out.mkdir(parents=True, exist_ok=True)
    links: dict[str, str] = {}
    for name in report["domains"]:
        links[name] = f"rollouts-{re.sub(r'[^A-Za-z0-9-]', '_', name)}.html"
        body = (
            f'<p><a href="index.html">Back to the run</a></p>{browse.render(_sides(stages, name))}'
        )
        _write(out / links[name], f"Rollouts: {name}", body)
    sections = (
        _head(report, stages[f"{UNIFIED}.gate"], models),
        "<h2>Pass rate on held-out tasks</h2>" + _pass_rates(report, links),
        f"<h2>Gate: {_held(report['gate']['held'])}</h2>" + _checks(report["gate"]["checks"]),
        "<h2>Curves</h2>" + _curves(stages.values()),
        "<h2>Stages</h2>" + _costs(stages.values()),
    )
    title = f"katcore: {report['preset']}, seed {report['seed']}"
    _write(out / "index.html", title, "".join(sections))
    return out / "index.html"


def _stages(gate: Path) -> Iterator[_Stage]:
    """The gate and all that it was made from, inputs first."""
    root, seen = gate.parents[1], set[Path]()

    def visit(folder: Path) -> Iterator[_Stage]:
        if folder in seen or not (folder / "manifest.json").exists():
            return
        seen.add(folder)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for name, key in manifest["inputs"].items():
            yield from visit(root / name / key)
        yield _Stage(folder, manifest)

    return visit(gate)


def _sides(stages: Mapping[str, _Stage], name: str) -> dict[str, Path]:
    owners = dict.fromkeys(COLUMNS, f"{name}.evaluate") | {UNIFIED: f"{UNIFIED}.evaluate"}
    return {
        column: stages[owner].folder / f"{column}.greedy.{name}.jsonl"
        for column, owner in owners.items()
        if owner in stages
    }


def _head(report: Mapping[str, Any], gate: _Stage, models: Mapping[str, str]) -> str:
    ended_s = gate.manifest["started"] + gate.manifest["seconds"]
    ended = datetime.fromtimestamp(ended_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    packages = ", ".join(f"{name} {v}" for name, v in gate.manifest["packages"].items() if v)
    versions = ", ".join(f"{name} v{version}" for name, version in models.items())
    return (
        f"<h1>Preset {escape(report['preset'])}, seed {escape(report['seed'])}</h1>"
        f"<p>Judged {ended}. Registered: {escape(versions) or 'nothing yet'}.<br>{escape(packages)}</p>"
    )


def _pass_rates(report: Mapping[str, Any], links: Mapping[str, str]) -> str:
    rows = []
    for name, domain in report["domains"].items():
        cells = [
            f"<b>{escape(name)}</b><small>{domain['base']['n']} tasks,"
            f' <a href="{escape(links[name])}">rollouts</a></small>'
        ]
        for column in COLUMNS:
            rate, sampled = domain[column], domain["sampled"][column]
            low, high = 100 * rate["low"], 100 * rate["high"]
            cells.append(
                f"<b>{100 * rate['rate']:.1f}</b> %"
                f"{interval(rate['rate'], rate['low'], rate['high'])}"
                f"<small>{low:.1f} to {high:.1f};"
                f" sampled {100 * sampled['rate']:.1f} (of {sampled['n']})</small>"
            )
        rows.append(cells)
    titles = [column.upper() if column in {"sft", "rl"} else column for column in COLUMNS]
    note = "<p>Greedy, with Wilson's 95 % interval; below it the rate when sampled.</p>"
    return table(("domain", *titles), rows, num_text=1) + note


def _checks(checks: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            escape(check["domain"]),
            escape(check["what"]),
            escape(check["wanted"]),
            _held(check["held"]),
            number(check["value"]),
            f"{number(check['low'])} to {number(check['high'])}",
        ]
        for check in checks
    ]
    return table(("domain", "what", "wanted", "", "value", "95 % interval"), rows, num_text=4)


def _curves(stages: Iterable[_Stage]) -> str:
    sections: list[str] = []
    for stage in stages:
        series = _series(stage.folder / CURVE)
        hidden = {"kl_old"} if "kl" in series else set()
        if stage.manifest["spec"]["stage"] == "rl":
            hidden.add("loss")  # of a surrogate it says nothing
        drawn = "".join(
            curve(name, points.items(), low=0.0 if kind in _FROM_ZERO else None)
            for kind in _CURVES
            for name, points in series.items()
            if name.partition("/")[0] == kind and kind not in hidden
        )
        if drawn:
            sections.append(f'<h3>{escape(stage.id)}</h3><div class="charts">{drawn}</div>')
    return "".join(sections) or "<p>No stage has left a curve.</p>"


def _series(path: Path) -> dict[str, dict[float, float]]:
    """Value by step of every metric; a step that was repeated after a restart counts once."""
    series: dict[str, dict[float, float]] = {}
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                row = json.loads(line) if line.endswith(b"\n") else {}
                for name, value in row.items():
                    if name != "step":
                        series.setdefault(name, {})[float(row["step"])] = float(value)
    return {name: dict(sorted(points.items())) for name, points in series.items()}


def _costs(stages: Iterable[_Stage]) -> str:
    manifests = [stage.manifest for stage in stages]
    longest = max([manifest["seconds"] for manifest in manifests], default=1) or 1
    rows = [
        [
            escape(manifest["id"]),
            f"<code>{escape(manifest['key'])}</code>",
            f'<span class="bar" style="width:{8 * manifest["seconds"] / longest:.2f}rem"></span>'
            f" {_clock(manifest['seconds'])}",
            f"{manifest['cpu_seconds']:.0f}",
            f"{manifest['max_rss_mib']:.0f}",
        ]
        for manifest in manifests
    ]
    total = [sum(manifest[name] for manifest in manifests) for name in ("seconds", "cpu_seconds")]
    rows.append(["<b>all</b>", "", f"<b>{_clock(total[0])}</b>", f"<b>{total[1]:.0f}</b>", ""])
    return table(("stage", "key", "time", "CPU seconds", "memory, MiB"), rows, num_text=2)


def _held(is_held: bool) -> str:  # noqa: FBT001 - one word for a flag
    return f'<span class="{"held" if is_held else "failed"}">{"held" if is_held else "not held"}</span>'


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _write(path: Path, title: str, body: str) -> None:
    head = "" if body.startswith("<h1>") else f"<h1>{escape(title)}</h1>"
    write(path, document(title, head + body))
