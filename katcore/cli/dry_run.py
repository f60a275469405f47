"""`kat train`: all stages of a preset, or one training's file; with `--dry-run`, whether it would fit."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from katcore.cli.common import out, say
from katcore.pipeline.commands import num_gpus
from katcore.pipeline.dry_run import Report, StageReport

_GIB = 1 << 30


def shown(report: Report, *, as_json: bool) -> None:
    """Print a dry run; exits with 1 if it does not fit."""
    if as_json:
        typer.echo(json.dumps(as_record(report)))
    else:
        _print(report)
    for line in refusals(report):
        say(line)
    if not report.fits:
        raise typer.Exit(1)


def as_record(report: Report) -> dict[str, Any]:
    """The dry run as JSON; memory in bytes for each GPU, `host` for each machine, `disk` for all."""
    shape, card = report.asked.shape, report.card
    return {
        "fits": report.fits,
        "gpu": {"name": card.name, "bytes": card.memory} if card else None,
        "parameters": {"total": shape.num_parameters, "active": shape.num_active},
        "stages": [
            {
                "stage": one.stage,
                "commands": one.commands,
                "update": one.update,
                "rollouts": one.rollouts,
                "host": one.host,
                "disk": one.disk,
                "tokens_per_pass": one.held_tokens,
                "tokens_per_step": one.tokens,
                "update_seconds_bound": one.seconds or None,
                "conversations_at_once": one.conversations,
                "over": {found.phase: found.over for found in one.excesses},
            }
            for one in report.stages
        ],
        "gpus": num_gpus(report.asked.preset),
        "changes": report.changes,
    }


def refusals(report: Report) -> list[str]:
    """What does not fit, by how much, and what would."""
    lines = [
        f"does not fit: {one.stage}, {_PHASES[found.phase]}: {found.over / _GIB:.1f} GiB too much for"
        f" {report.card.name}, most of it {found.largest}"
        for one in report.stages
        for found in one.excesses
        if report.card
    ]
    if lines and not report.changes:
        lines.append("no few changes of its settings would make it fit; take larger or more GPUs")
    return lines + [f"would fit: {_yaml(change)}" for change in report.changes]


_PHASES = {"update": "updating weights", "rollouts": "making rollouts"}


def _yaml(value: Any) -> str:
    """A change as a line of a preset."""
    if isinstance(value, dict):
        return ", ".join(
            f"{name}: {{{_yaml(part)}}}" if isinstance(part, dict) else f"{name}: {_yaml(part)}"
            for name, part in value.items()
        )
    return json.dumps(value).strip('"')


def _print(report: Report) -> None:
    shape = report.asked.shape
    active = (
        "" if shape.num_active == shape.num_parameters else f", {shape.num_active:,} for a token"
    )
    say(f"model: {shape.num_parameters:,} parameters{active}")
    for line in _commands(report.stages):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    for phase, title in _PHASES.items():
        if any(getattr(one, phase) for one in report.stages):
            out.print(_table(report, phase, title))
    for one in report.stages:
        if said := _step(one):
            out.print(said, markup=False, highlight=False, soft_wrap=True)
    for line in _notes(report):
        say(line)


def _commands(stages: Sequence[StageReport]) -> Iterator[str]:
    """Each line once, after the stages and the machines that it is for."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for one in stages:
        for place, lines in one.commands.items():
            for line in lines:
                names, places = found.setdefault(line, ({}, {}))
                names[one.stage] = None
                places[place] = None
    for line, (names, places) in found.items():
        first, *others = places
        if others:
            first = f"nodes 0 to {len(others)}"
        yield f"{', '.join([*names, first])}: {line}"


def _notes(report: Report) -> Iterator[str]:
    """What the numbers are for."""
    preset, card = report.asked.preset, report.card
    if num := num_gpus(preset):
        yield f"a machine has to have {num} GPUs"
    if card is None:
        yield "no GPU is named, so nothing was refused: --gpu 80GiB, or scale: {gpu: H100}"
        return
    if preset.scale.device == "cpu":
        yield (
            "scale.device is cpu: trainings, and engines in their process, would use no GPU; for one, set"
            " device: cuda"
        )
    if report.fits:
        yield f"fits {card.name}"


def _table(report: Report, phase: str, title: str) -> Table:
    """Memory of one GPU in GiB: a row for each part, a column for each stage."""
    stages = [one for one in report.stages if getattr(one, phase)]
    is_on_gpu = report.card or report.asked.preset.scale.device == "cuda"
    table = Table(title=f"GiB {'on each GPU' if is_on_gpu else 'of each process'}, {title}")
    table.add_column("")
    for one in stages:
        table.add_column(one.stage, justify="right")
    parts = dict.fromkeys(name for one in stages for name in getattr(one, phase))
    for name in parts:
        values = [getattr(one, phase).get(name, 0) for one in stages]
        table.add_row(name, *(f"{num / _GIB:.2f}" if num else "" for num in values))
    table.add_section()
    table.add_row("all", *(f"{sum(getattr(one, phase).values()) / _GIB:.2f}" for one in stages))
    if report.card:
        room = f"{report.room / _GIB:.2f}"
        table.add_row(f"{report.card.name}, less a reserve", *([room] * len(stages)))
    return table


def _step(one: StageReport) -> str:
    found = []
    if one.tokens:
        found.append(f"at most {one.tokens:,} tokens a step, {one.held_tokens:,} a pass")
    if one.seconds:
        found.append(f"updates no faster than {one.seconds:.3g} s")
    if one.host:
        found.append(f"{one.host / _GIB:.0f} GiB of main memory on each machine")
    if one.disk >= _GIB:
        found.append(f"leaves {one.disk / _GIB:.0f} GiB on disk")
    if one.conversations:
        found.append(f"cache for {one.conversations} conversations of full length at once")
    return f"{one.stage}: {'; '.join(found)}" if found else ""


def training_verb(path: Path) -> str:
    """Which of sft, rl and distill a training's file is for; "" for a preset, by its name or file."""
    import yaml

    from katcore.config import preset_names
    from katcore.errors import ConfigError

    if not path.exists():
        if str(path) in preset_names():
            return ""
        names = ", ".join(preset_names())
        raise ConfigError(f"{path}: no such file, and no preset of that name; there are {names}")
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {content!r}")
    if "out" not in content:
        return ""
    return "distill" if "domains" in content else "rl" if "tasks" in content else "sft"
