"""`kat collect CONFIG`: a scaffold on a folder of tasks against any engine, outside the pipeline.

    <home>/collections/<name>/config.json      what it was made with; another config needs another name
    <home>/collections/<name>/calls.jsonl      every model call, on disk before its answer was released
    <home>/collections/<name>/rollouts.jsonl   one line per rollout, as it ended
    <home>/collections/<name>/tokens.json      the text of every id, where the engine can tell
    <home>/collections/<name>/<formatter>.jsonl

The same command goes on where it was stopped: what was scored is not done again. With `artifacts` it
does so on another machine, too.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from katcore.config import Settings, home, load_yaml
from katcore.errors import ConfigError
from katcore.pipeline.archive import Archive
from katcore.pipeline.recorded import write_rows
from katcore.pipeline.rollouts import RolloutFile
from katcore.plugin import Plugins
from katcore.protocols import Engine, RunsInside, SupportsClose, SupportsOpen, SupportsTokens
from katcore.proxy.server import Proxy
from katcore.proxy.session import Budget
from katcore.rollout.collect import Limits, collect
from katcore.rollout.single import Attempt, Parts
from katcore.sandbox.lease import open_backend
from katcore.schema.call import Sampling
from katcore.schema.codec import read_lines
from katcore.schema.event import RolloutFinished
from katcore.schema.rollout import Outcome, Rollout
from katcore.schema.task import Task


class Choice(Settings):
    """An offer by its name, and its options beside it; a name alone will do."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The options of the offer."""
        return dict(self.model_extra or {})


class SamplingSettings(Settings):
    """How answers are drawn, whatever the agent asks for; `max_tokens` bounds one answer."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_tokens: int = Field(default=8192, ge=1)


class BudgetSettings(Settings):
    """What one rollout may spend: model calls, sampled tokens, seconds."""

    max_calls: int = Field(default=100, ge=1)
    max_tokens: int = Field(default=1 << 20, ge=1)
    seconds: float = Field(default=3600.0, gt=0)


class CollectionConfig(Settings):
    """A collection.

    `tasks` is a folder of task directories in Harbor's format. With `is_training` off, the agent chooses how
    answers are drawn. `traces` is how many rollouts MLflow gets as traces; 0 leaves MLflow out. `artifacts`
    is a root, such as `s3://bucket/katcore`, under which each rollout is kept with its calls as it ends.
    """

    tasks: Path
    scaffold: Choice
    engine: Choice
    split: str = "train"
    max_tasks: int | None = Field(default=None, ge=1)
    attempts: int = Field(default=1, ge=1)
    concurrency: int = Field(default=4, ge=1)
    sandbox: Choice = Choice(name="local")
    verifier: Choice = Choice(name="test-script")
    formatters: tuple[Choice, ...] = (Choice(name="tree"), Choice(name="chat"))
    sampling: SamplingSettings = SamplingSettings()
    budget: BudgetSettings = BudgetSettings()
    is_training: bool = True
    traces: int = Field(default=100, ge=0)
    artifacts: str = ""


@dataclass(slots=True)
class Tally:
    """What became of the rollouts so far."""

    total: int
    passed: int = 0
    failed: int = 0
    lost: int = 0
    calls: int = 0
    inexact: int = 0
    roles: dict[str, int] = field(default_factory=dict)

    def add(self, rollout: Rollout) -> None:
        """Count one more."""
        if rollout.outcome is not Outcome.SCORED:
            self.lost += 1
        elif rollout.reward == 1.0:
            self.passed += 1
        else:
            self.failed += 1
        for turn in rollout.trajectory.turns:
            self.calls += 1
            self.inexact += not turn.is_exact
            self.roles[turn.role] = self.roles.get(turn.role, 0) + 1

    @property
    def done(self) -> int:
        """How many have ended."""
        return self.passed + self.failed + self.lost


def load_collection(path: Path) -> CollectionConfig:
    """The config of a YAML file; relative paths in it are from its folder.

    Raises:
        ConfigError: not there, not YAML, or a field does not fit; says which.
    """
    config = load_yaml(path, CollectionConfig)
    return config.model_copy(update={"tasks": (path.parent / config.tasks).resolve()})


def open_folder(name: str, config: CollectionConfig) -> Path:
    """The folder of the collection, new or to go on with.

    Raises:
        ConfigError: it was made with another config.
    """
    folder = home() / "collections" / name
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / "config.json"
    now = config.model_dump_json(indent=1)
    if noted.exists() and json.loads(noted.read_text()) != json.loads(now):
        raise ConfigError(
            f"{folder} was made with another config; choose another --name, or remove the folder"
        )
    noted.write_text(now)
    return folder


async def run(
    folder: Path, config: CollectionConfig, plugins: Plugins, report: Callable[[str], None]
) -> AsyncIterator[Tally]:
    """Make what is missing; yields the tally after each rollout, then writes the formats."""
    formatters = {
        choice.name: plugins.make("formatter", choice.name, choice.options)
        for choice in config.formatters
    }
    tasks = _tasks(config, plugins)
    engine: Engine = plugins.make("engine", config.engine.name, config.engine.options)
    scaffold = plugins.make("scaffold", config.scaffold.name, config.scaffold.options)
    if isinstance(scaffold, RunsInside):
        await scaffold.install(report)
    archive = await _restored(folder, config.artifacts, report)
    file = RolloutFile(folder / "rollouts.jsonl")
    tally = Tally(len(tasks) * config.attempts)
    done = _scored(file, tally)
    yield tally
    try:
        if isinstance(engine, SupportsOpen):
            await engine.open(report)
        name, options = config.sandbox.name, config.sandbox.options
        async with (
            open_backend(plugins, name, options, work=f"collect {folder.name}") as backend,
            Proxy(folder / "calls.jsonl") as proxy,
        ):
            parts = Parts(
                proxy,
                backend,
                scaffold,
                plugins.make("verifier", config.verifier.name, config.verifier.options),
                Sampling(**config.sampling.model_dump()),
                Budget(**config.budget.model_dump()),
                config.scaffold.name,
                config.is_training,
            )
            attempts = (
                Attempt(task, engine, number)
                for task in tasks
                for number in range(config.attempts)
                if (task.id, number) not in done
            )
            async for rollout in collect(attempts, parts, Limits(config.concurrency)):
                file.append(rollout)
                await asyncio.to_thread(archive.keep, rollout)
                tally.add(rollout)
                plugins.notify("katcore_rollout_finished", RolloutFinished(rollout))
                yield tally
        for name, formatter in formatters.items():
            write_rows(folder / f"{name}.jsonl", formatter.samples(rollouts_of(folder)))
        if isinstance(engine, SupportsTokens):
            _write_tokens(folder, engine)
        if config.traces:
            report("writing to MLflow")
            await asyncio.to_thread(_log, folder, config, tally)
        archive.check()
    finally:
        file.close()
        if isinstance(engine, SupportsClose):
            await engine.close()


async def _restored(folder: Path, root: str, report: Callable[[str], None]) -> Archive:
    archive = Archive(folder, root)
    if num := await asyncio.to_thread(archive.restore):
        report(f"{num} rollouts were in {root} already")
    return archive


def rollouts_of(folder: Path) -> Iterator[Rollout]:
    """The rollouts of a collection: of each attempt at a task the last."""
    path = folder / "rollouts.jsonl"
    last = {(item.task_id, item.attempt): item.id for item in read_lines(Rollout, path)}
    chosen = set(last.values())
    return (rollout for rollout in read_lines(Rollout, path) if rollout.id in chosen)


def _tasks(config: CollectionConfig, plugins: Plugins) -> list[Task]:
    dataset = plugins.make("dataset", "harbor", {"root": config.tasks})
    tasks = list(dataset.tasks(config.split))[: config.max_tasks]
    if not tasks:
        raise ConfigError(f"{config.tasks}: there is no task in it")
    return tasks


def _scored(file: RolloutFile, tally: Tally) -> set[tuple[str, int]]:
    done = set()
    for rollout in file.read():
        if rollout.outcome is Outcome.SCORED:
            done.add((rollout.task_id, rollout.attempt))
            tally.add(rollout)
    return done


def _log(folder: Path, config: CollectionConfig, tally: Tally) -> None:
    """The collection as an MLflow run, and its rollouts as traces; again after each time it went on."""
    experiment = f"collect/{folder.name}"
    tracking = import_module("katcore.registry.tracking")
    memory = folder / "mlflow_run"
    run = tracking.open_run(experiment, folder.name, {}, config.model_dump(mode="json"), memory)
    scored = tally.passed + tally.failed
    numbers = {
        "passed": tally.passed,
        "failed": tally.failed,
        "lost": tally.lost,
        "pass_rate": tally.passed / max(1, scored),
        "infra_failed_rate": tally.lost / max(1, tally.done),
        "exact_prompt_match_frac": 1 - tally.inexact / max(1, tally.calls),
    }
    run.log([(0, numbers)])
    run.end()
    traced = folder / "traced.json"
    before = set(json.loads(traced.read_text())) if traced.exists() else set()
    fresh = [item for item in islice(rollouts_of(folder), config.traces) if item.id not in before]
    import_module("katcore.registry.traces").log_rollouts(experiment, fresh)
    traced.write_text(json.dumps(sorted(before | {item.id for item in fresh})))


def _write_tokens(folder: Path, engine: SupportsTokens) -> None:
    ids = {
        number
        for rollout in rollouts_of(folder)
        for turn in rollout.trajectory.turns
        for number in (*turn.prompt_ids, *turn.ids)
    }
    (folder / "tokens.json").write_text(json.dumps(engine.token_texts(ids), ensure_ascii=False))
