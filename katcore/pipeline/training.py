"""What the file of `kat sft|rl|distill FILE` may say. Relative paths in it are from its folder."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from katcore.config import (
    DistillSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    Preset,
    RlSettings,
    ScaleSettings,
    Settings,
    SftSettings,
    check_balance,
    check_staleness,
    check_weighting,
    load_yaml,
)
from katcore.errors import ConfigError
from katcore.pipeline.collection import Choice
from katcore.serving import ServeSettings


class TrainingConfig(Settings):
    """What every training has.

    `model` is a model folder, the folder of an earlier training, or a registered model:
    `models:/NAME/VERSION` or `models:/NAME@ALIAS`. `context` bounds a sample, and a conversation.
    `micro_batch_tokens` bounds the padded tokens of one pass: memory, never results.
    `tree`, `weighting`, `balance`, `scale`, `optimizer` and `lora` are those of a preset; without `lora` all
    weights are trained.
    """

    model: str
    out: Path
    seed: int = Field(default=0, ge=0)
    context: int = Field(default=4096, ge=2)
    micro_batch_tokens: int = Field(default=8192, ge=1)
    threads: int = Field(default=2, ge=1)
    tree: Literal["auto", "required"] = "auto"
    weighting: Literal["path", "once"] = "path"
    balance: float = Field(default=0.0, ge=0)
    scale: ScaleSettings = ScaleSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _check_trained(self) -> "TrainingConfig":
        check_balance(self.balance, self.lora)
        return self


class SftConfig(TrainingConfig):
    """Supervised fine-tuning.

    `rollouts` are files of rollouts, or folders with a `rollouts.jsonl`: of `kat collect`, of `kat import`,
    of stages. `take: passed` has those with a reward of 1; `all` those that failed, and those that nobody
    judged, too. `ids: new` has the model's own tokenizer read what was said: for rollouts of other models.
    The formatter makes token trees of them.
    """

    rollouts: tuple[Path, ...] = Field(min_length=1)
    take: Literal["passed", "all"] = "passed"
    ids: Literal["recorded", "new"] = "recorded"
    formatter: Choice = Choice(name="sft_tree")
    sft: SftSettings = SftSettings()


class TasksConfig(Settings):
    """Tasks in Harbor's format, and the parts that work on them."""

    tasks: Path
    scaffold: Choice
    verifier: Choice = Choice(name="test-script")
    split: str = "train"
    max_tasks: int | None = Field(default=None, ge=1)


class RolloutConfig(TrainingConfig):
    """What every training on rollouts of its own has; `max_new_tokens` bounds one answer."""

    sandbox: Choice = Choice(name="local")
    concurrency: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=1024, ge=1)
    serve: ServeSettings = ServeSettings()


class RlConfig(RolloutConfig, TasksConfig):
    """Reinforcement on tasks."""

    formatter: Choice = Choice(name="rl_tree")
    rl: RlSettings = RlSettings()

    @model_validator(mode="after")
    def _check_tasks(self) -> "RlConfig":
        if self.rl.tasks != "all":
            raise ValueError(
                "rl.tasks: only a run's stages know which are unseen; name a folder of such tasks"
            )
        check_staleness(self.rl, self.serve)
        check_weighting(self.rl, self.weighting)
        return self


class DomainConfig(TasksConfig):
    """One domain of a distillation.

    `teacher` is its expert's model, written as `model` is. `rollouts` are late ones of the teacher, for
    `cold_steps`; `measured` are those that it was evaluated by, for `teacher: best`: of its own domain, or of
    the one that their tasks name. `prompts` and `cold_batch` are its share, if not that of `distill`.
    """

    teacher: str
    rollouts: Path | None = None
    measured: tuple[Path, ...] = ()
    formatter: Choice = Choice(name="distill_tree")
    prompts: int | None = Field(default=None, ge=1)
    cold_batch: int | None = Field(default=None, ge=1)


class DistillConfig(RolloutConfig):
    """Distillation of several teachers into the model, each in its domain."""

    domains: dict[str, DomainConfig] = Field(min_length=1)
    distill: DistillSettings = DistillSettings()

    @model_validator(mode="after")
    def _check_rollouts(self) -> "DistillConfig":
        bare = [name for name, domain in self.domains.items() if domain.rollouts is None]
        if self.distill.cold_steps and bare:
            raise ValueError(
                f"distill.cold_steps begins on rollouts of the teachers: give domains.{bare[0]}.rollouts, or"
                " set it to 0"
            )
        return self


CONFIGS: Mapping[str, type[TrainingConfig]] = {
    "sft": SftConfig,
    "rl": RlConfig,
    "distill": DistillConfig,
}
"""By verb."""
ConfigT = TypeVar("ConfigT", bound=TrainingConfig)


def load_training(path: Path, kind: type[ConfigT]) -> ConfigT:
    """The config of a YAML file, with `out` made absolute.

    Raises:
        ConfigError: not there, not YAML, or a field does not fit; says which.
    """
    config = load_yaml(path, kind)
    return config.model_copy(update={"out": (path.parent / config.out).resolve()})


def model_folder(text: str, base: Path) -> Path:
    """The model folder that a config names, relative to `base`.

    Raises:
        ConfigError: there is none.
    """
    if text.startswith("models:/"):
        registry = import_module("katcore.registry.models")
        folder = Path(registry.find(text))
    else:
        folder = (base / text).resolve()
    for found in (folder, folder / "model"):
        if (found / "config.json").is_file() and (found / "tokenizer_config.json").is_file():
            return found
    raise ConfigError(
        f"{text}: no model in {folder}: expected config.json, tokenizer_config.json and weights, there or in"
        " model/; or write models:/NAME/VERSION for a registered one"
    )


def preset_of(name: str, config: TrainingConfig) -> Preset:
    """The config as the settings of a run, for what reads these."""
    given: dict[str, Any] = {
        "model": ModelSettings(context=config.context),
        "micro_batch_tokens": config.micro_batch_tokens,
        "tree": config.tree,
        "weighting": config.weighting,
        "balance": config.balance,
        "scale": config.scale,
        "optimizer": config.optimizer,
        "lora": config.lora,
    }
    if isinstance(config, RolloutConfig):
        given |= {
            "sandbox": config.sandbox.name,
            "sandbox_options": config.sandbox.options,
            "concurrency": config.concurrency,
            "max_new_tokens": config.max_new_tokens,
            "serve": config.serve,
        }
    for section in ("sft", "rl", "distill"):
        if hasattr(config, section):
            given[section] = getattr(config, section)
    return Preset(name=name, summary="", **given)
