"""Training from a file: `kat sft|rl|distill FILE`, with a bar that has the last step's numbers."""

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from katcore.cli.common import err, errors_said, own_output, say
from katcore.config import is_first_process
from katcore.plugin import Plugins

_SHOWN = (
    "loss", "reward", "kl", "kl_old", "clip_rate", "entropy", "tokens_per_s", "infra_failed_rate",
)  # fmt: skip
EXAMPLES = {
    "sft": (
        "model: base                          # or models:/NAME@ALIAS",
        "rollouts: [.kat/collections/first]",
        "out: models/sft",
        "sft: {steps: 100, batch: 16}",
    ),
    "rl": (
        "model: models/sft",
        "tasks: tasks",
        "scaffold: mini",
        "out: models/rl",
        "rl: {steps: 50, prompts: 8}",
    ),
    "distill": (
        "model: models/sft",
        "domains: {shell: {teacher: models/rl, tasks: tasks, scaffold: mini}}",
        "out: models/unified",
        "distill: {steps: 50, prompts: 8}",
    ),
}
"""A file for each verb, as `--help` shows it."""


def train(verb: str, path: Path) -> None:
    """Train as the file says; prints where the model is."""
    from katcore.pipeline import launch
    from katcore.pipeline.training import CONFIGS, load_training

    with errors_said():
        config = load_training(path, CONFIGS[verb])
        if launch.is_needed(config.scale):
            launch.launch([verb, str(path)], config.scale)
            return
        plugins = Plugins.installed()
        say(f"{verb}: {config.model} to {config.out}")
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=err,
            disable=not is_first_process(),
        )
        with bar:
            shown = bar.add_task(verb, total=None, numbers="")

            def show(step: int, steps: int, metrics: Mapping[str, float]) -> None:
                numbers = ", ".join(
                    f"{name} {metrics[name]:.3g}" for name in _SHOWN if name in metrics
                )
                bar.update(shown, total=steps, completed=step + 1, numbers=numbers)

            with own_output():
                from katcore.pipeline import trained

                done = trained.run(path, config, plugins, show)
        say(f"{verb}: {'unchanged, skipped' if done.is_skipped else 'done'}")
        typer.echo(done.path / "model")
