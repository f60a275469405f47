"""`kat sft|rl|distill FILE`: the training of the stages on models, samples and tasks of one's own.

    <out>/model/            what was trained
    <out>/config.json       what it was made with; another config needs another `out`, but for what changes
                            memory, time and checkpoints, not results
    <out>/manifest.json     hashes of all files, and the models that it came from
    <out>/curve.jsonl       the metrics of each step; MLflow has them too, in experiment train/<name of out>
    <out>.work/             as it grows; the same command goes on from there, and then `out` appears whole

`rl` and `distill` leave `rollouts.jsonl` and `calls.jsonl` besides.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from katcore.config import DistillSettings, is_first_process
from katcore.errors import ConfigError, StageError
from katcore.inference.chat import ChatTokenizer
from katcore.pipeline import distill, rl, sft
from katcore.pipeline.collection import Choice
from katcore.pipeline.lineage import MANIFEST
from katcore.pipeline.plan import Plan, StageSpec
from katcore.pipeline.progress import Show
from katcore.pipeline.recorded import read_rollouts, rollout_file
from katcore.pipeline.stage import Finished, Job, Work, make
from katcore.pipeline.training import (
    CONFIGS,
    DistillConfig,
    DomainConfig,
    RlConfig,
    SftConfig,
    TasksConfig,
    TrainingConfig,
    model_folder,
    preset_of,
)
from katcore.plugin import Plugins
from katcore.schema.expert import Expert
from katcore.schema.rollout import Outcome, Rollout, Verdict
from katcore.schema.sample import Sample
from katcore.schema.task import Task
from katcore.train.policy import limit_threads
from katcore.trajectory.origin import tokenised

_CONFIG = "config.json"
_FREE = frozenset(
    {
        "micro_batch_tokens",
        "threads",
        "concurrency",
        "scale.recompute",
        "scale.gpu",
        *(f"{verb}.checkpoint_every" for verb in CONFIGS),
    }
)
"""What may be another when a training goes on."""


def run(path: Path, config: TrainingConfig, plugins: Plugins, show: Show | None = None) -> Finished:
    """Do what the file `path` says, or go on with it, or find it done.

    Raises:
        ConfigError: an input is not there, or `out` was made with another config; says which.
        PluginError: a part is not installed.
        StageError: nothing can be trained on, or another process is at it.
    """
    if isinstance(config, SftConfig):
        work = _sft(config, path.parent, plugins)
    elif isinstance(config, RlConfig):
        work = _rl(config, path, plugins)
    else:
        assert isinstance(config, DistillConfig)
        work = _distill(config, path.parent, plugins)
    return _make(path, config, plugins, replace(work, show=show))


def _sft(config: SftConfig, base: Path, plugins: Plugins) -> Work:
    start = model_folder(config.model, base)
    files = [rollout_file(base / source) for source in config.rollouts]
    name, options = config.formatter.name, config.formatter.options
    if name == "sft_tree":
        options = {"tokenizer": start} | options
    formatter = plugins.make("formatter", name, options)
    chat = ChatTokenizer(start)

    def work(job: Job) -> dict[str, float]:
        taken = _taken(files, config.take)
        if config.ids == "new":
            taken = (replace(one, trajectory=tokenised(one.trajectory, chat)) for one in taken)
        samples = list(_trees(formatter.samples(taken), name, chat.vocabulary))
        return sft.train(job, start, samples, config.sft)

    return Work(work, (start,))


def _rl(config: RlConfig, path: Path, plugins: Plugins) -> Work:
    start = model_folder(config.model, path.parent)
    expert = _expert(path.stem, config, config.formatter, plugins)
    tasks = _tasks(config, path.parent, plugins)
    return Work(lambda job: rl.train(job, start, expert, tasks), (start,))


def _distill(config: DistillConfig, base: Path, plugins: Plugins) -> Work:
    start = model_folder(config.model, base)
    domains = [
        distill.Domain(
            _expert(name, own, own.formatter, plugins),
            [replace(task, domain=name) for task in _tasks(own, base, plugins)],
            model_folder(own.teacher, base),
            _share(config.distill, own),
            rollout_file(base / own.rollouts) if own.rollouts else None,
            tuple(rollout_file(base / file) for file in own.measured),
        )
        for name, own in config.domains.items()
    ]
    models = (start, *(domain.model for domain in domains))
    return Work(lambda job: distill.train(job, start, domains), models)


def _make(path: Path, config: TrainingConfig, plugins: Plugins, work: Work) -> Finished:
    verb = next(name for name, kind in CONFIGS.items() if type(config) is kind)
    out = config.out
    content = config.model_dump(mode="json")
    if is_first_process():
        _note(out, content)
    spec = StageSpec(verb, verb, config=content)
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    plan = Plan(preset_of(path.stem, config), config.seed, (), {verb: spec}, {verb: key})

    def limited(job: Job) -> dict[str, float]:
        limit_threads(config.threads)
        return work.run(job)

    return make(
        out, plan, spec, plugins, replace(work, run=limited, experiment=f"train/{out.name}")
    )


def _note(out: Path, content: Mapping[str, Any]) -> None:
    """Note the config in the output as it grows.

    Raises:
        ConfigError: `out` holds something else.
    """
    growing = out.with_name(f"{out.name}.work") / "out" / _CONFIG
    if out.exists() and not (out / MANIFEST).exists():
        raise ConfigError(f"{out} is there already, and no output of kat; choose another `out`")
    for noted in (out / _CONFIG, growing):
        if noted.exists() and _lasting(json.loads(noted.read_bytes())) != _lasting(content):
            raise ConfigError(
                f"{noted.parent} was made with another config; choose another `out`, or remove it"
            )
    if not out.exists():
        growing.parent.mkdir(parents=True, exist_ok=True)
        growing.write_text(json.dumps(content, indent=1))


def _lasting(content: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config makes a training another one."""
    found = {name: value for name, value in content.items() if name not in _FREE}
    if content.get("balance"):  # its statistics are over micro-batches
        found["micro_batch_tokens"] = content["micro_batch_tokens"]
    for name, own in found.items():
        if isinstance(own, Mapping):
            found[name] = {key: value for key, value in own.items() if f"{name}.{key}" not in _FREE}
    return found


def _expert(name: str, own: TasksConfig, formatter: Choice, plugins: Plugins) -> Expert:
    chosen = {"scaffold": own.scaffold, "verifier": own.verifier, "formatter": formatter}
    for kind, choice in chosen.items():
        plugins.make(kind, choice.name, choice.options)
    return Expert(
        name,
        name,
        "",
        "",
        "harbor",
        own.scaffold.name,
        own.verifier.name,
        formatter.name,
        scaffold_options=own.scaffold.options,
        verifier_options=own.verifier.options,
        formatter_options=formatter.options,
    )


def _tasks(own: TasksConfig, base: Path, plugins: Plugins) -> list[Task]:
    root = (base / own.tasks).resolve()
    dataset = plugins.make("dataset", "harbor", {"root": root})
    tasks = list(dataset.tasks(own.split))[: own.max_tasks]
    if not tasks:
        raise ConfigError(f"{root}: there is no task in split {own.split!r}")
    return tasks


def _share(settings: DistillSettings, own: DomainConfig) -> DistillSettings:
    given = {"prompts": own.prompts, "cold_batch": own.cold_batch}
    return settings.model_copy(update={name: num for name, num in given.items() if num})


def _taken(files: Iterable[Path], take: str) -> Iterator[Rollout]:
    for path in files:
        for rollout in read_rollouts(path):
            if take == "passed" and rollout.reward != 1.0:
                continue
            if rollout.outcome is Outcome.SCORED and rollout.reward is None:
                # Formatters leave out what was lost; this was not, though nobody judged it.
                yield replace(rollout, verdict=Verdict(1.0, "not judged"))
            else:
                yield rollout


def _trees(rows: Iterable[Any], formatter: str, vocabulary: int) -> Iterator[Sample]:
    for row in rows:
        if not isinstance(row, Sample):
            raise ConfigError(
                f"formatter {formatter!r} makes no token trees; take sft_tree or tree"
            )
        if max(row.tokens) >= vocabulary:
            raise StageError(
                f"{row.rollout_id}: token {max(row.tokens)} is none of the model's {vocabulary}: another"
                " tokenizer made it; set ids: new"
            )
        yield row
