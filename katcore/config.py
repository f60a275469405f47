"""YAML to validated records, and the only reader of the process environment."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from katcore.errors import ConfigError
from katcore.serving import ServeSettings
from katcore.settings import BaseTrainingSettings as BaseTrainingSettings
from katcore.settings import EvaluateSettings as EvaluateSettings
from katcore.settings import LoraSettings as LoraSettings
from katcore.settings import ModelSettings as ModelSettings
from katcore.settings import OptimizerSettings as OptimizerSettings
from katcore.settings import ScaleSettings as ScaleSettings
from katcore.settings import ScheduleSettings as ScheduleSettings
from katcore.settings import Settings as Settings

_PRESETS = Path(__file__).parent / "presets"


class CollectSettings(Settings):
    """Demonstrations replayed through sandbox, proxy and verifier."""

    max_tasks: int = 1500


class SftSettings(Settings):
    """Supervised fine-tuning on verified demonstrations.

    With `mask_failed`, an answer whose tool call failed is context: what comes after it is learnt, it is not.
    A training that is killed goes on from its last checkpoint: one is written every `checkpoint_every` steps.
    `lr` is 1e-5 where it is not given, and with adapters 1e-4; a model trained from scratch takes far more.
    """

    steps: int = 160
    batch: int = 64
    mask_failed: bool = True
    lr: float | None = Field(default=None, ge=0)
    warmup: int = 20
    final_lr: float = 0.1
    checkpoint_every: int = Field(default=50, ge=1)


class MclaSettings(Settings):
    """Log-probabilities averaged over `passes` prefills of each finished rollout, in batches that differ.

    `place` says whose: those of the engine, which then stand for the sampler's wherever these are used, or
    those of the trainer. `mean` is taken of logs, as KAT-Coder-V2 prints it, or of probabilities.
    """

    passes: int = Field(default=8, ge=1)
    place: Literal["engine", "trainer"] = "engine"
    mean: Literal["logs", "probabilities"] = "logs"


class RlSettings(Settings):
    """Group-relative policy optimisation on verifier rewards.

    `lr` is 1e-6 where it is not given, and with adapters 1e-5. It should not be above the one that
    fine-tuning ended with: a higher one undoes what it learnt.
    `tasks`: all, or those without a demonstration (`unseen`), whose answers SFT has not learnt by heart.
    A step attempts `prompts` of them, `group` times each. Where all attempts at a task had one reward nothing
    is learnt; others are attempted in its place, up to `resample` times `prompts` more.
    `discount` is what a turn earns of the turn after it; at 1 all turns of a rollout have its reward.
    `baseline` is what a turn is compared with: all turns of its group, scaled (`group`, as GRPO), or the same
    turn in the group's other rollouts (`turn`), which also tells quick successes from slow ones.
    `failed_penalty` is taken off the advantage of an answer whose tool call failed.
    `level` is what is clipped as one: a token (GRPO), a turn by the product of its ratios (KAT-Coder-V2) or
    by their geometric mean, or a whole sequence (GSPO). A ratio may be 1 - `clip_low` to 1 + `clip_high`: 0.2
    and 0.28 where these are not given, but 3e-4 and 4e-4 for geometric means (turn-geometric, sequence),
    which move far less. `mean`: each rollout counts the same, or each unit.
    `kl` holds the policy to the model it started as; `entropy` is a bonus; `imitation` weighs the likelihood
    of its own answers in rollouts that passed. `old` says whose log-probabilities the ratio starts from: the
    sampler's, or the trainer's own. Of tokens on which the two differ by a factor that is not in
    `correction_range`, `correction: icepop` leaves out all, `truncate` none; with `old: trainer` what stays
    weighs by the factor, at most the upper bound (a ratio that starts from the sampler has it already). The
    range is 0.5 to 5 where it is not given, and for `truncate`, which has an upper bound only, up to 2. With
    `mcla` (`{}` for its defaults) one of the two is a mean over several passes.
    """

    steps: int = 24
    tasks: Literal["all", "unseen"] = "all"
    prompts: int = 32
    resample: int = Field(default=0, ge=0)
    group: int = 8
    lr: float | None = Field(default=None, ge=0)
    warmup: int = 4
    final_lr: float = 0.3
    discount: float = 1.0
    baseline: Literal["group", "turn"] = "group"
    failed_penalty: float = Field(default=0.0, ge=0)
    epochs: int = 1
    minibatches: int = 2
    level: Literal["token", "turn", "turn-geometric", "sequence"] = "turn"
    clip_low: float = Field(default_factory=lambda given: _clip(given)[0])
    clip_high: float = Field(default_factory=lambda given: _clip(given)[1])
    mean: Literal["rollout", "unit"] = "rollout"
    kl: float = Field(default=0.0, ge=0)
    entropy: float = Field(default=0.0, ge=0)
    imitation: float = Field(default=0.0, ge=0)
    old: Literal["sampler", "trainer"] = "sampler"
    correction: Literal["none", "icepop", "truncate"] = "none"
    correction_range: tuple[float, float] = Field(default_factory=lambda given: _range(given))
    mcla: MclaSettings | None = None
    temperature: float = 1.0
    checkpoint_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _check_correction(self) -> "RlSettings":
        if self.correction == "truncate" and self.old == "sampler":
            raise ValueError(
                "truncate weighs by trainer over sampler, and a ratio that starts from the sampler has that"
                " in it already: set old: trainer"
            )
        is_trainer_asked = self.old == "trainer" or self.correction != "none"
        if self.mcla and self.mcla.place == "trainer" and not is_trainer_asked:
            raise ValueError(
                "mcla averages the trainer's log-probabilities, and nothing uses them: set old: trainer, or"
                " mcla.place: engine"
            )
        return self


def _clip(given: dict[str, Any]) -> tuple[float, float]:
    is_mean = given.get("level") in {"turn-geometric", "sequence"}
    return (3e-4, 4e-4) if is_mean else (0.2, 0.28)


def _range(given: dict[str, Any]) -> tuple[float, float]:
    return (0.5, 2.0 if given.get("correction") == "truncate" else 5.0)


def check_staleness(rl: RlSettings, serve: ServeSettings) -> None:
    """Raise ValueError if what the settings ask for needs weights that the engines have no more."""
    if serve.staleness and rl.mcla and rl.mcla.place == "engine":
        raise ValueError(
            "mcla.place: engine reads rollouts again with the weights that made them, which serve.staleness"
            " lets go: set staleness: 0, or mcla.place: trainer with old: trainer"
        )


def check_finished(serve: ServeSettings, lora: LoraSettings | None) -> None:
    """Raise ConfigError if servers that run elsewhere cannot get the models that are evaluated."""
    if serve.urls and lora:
        raise ConfigError(
            "evaluate has the servers at serve.urls read whole models, and with lora they take adapters only:"
            " leave urls out, so that kat starts its own, or train all weights"
        )


def check_weighting(rl: RlSettings, weighting: str) -> None:
    """Raise ValueError if tokens that branches share are to count once, and whole branches are the units."""
    if weighting == "once" and rl.level == "sequence":
        raise ValueError(
            "rl.level: sequence has whole branches as its units, and these share tokens, which then cannot"
            " count once: set weighting: path, or another level"
        )


class DistillSettings(Settings):
    """On-policy distillation: the student's own tokens, judged by the teacher of their domain.

    Before it come `cold_steps` on late rollouts of the teachers, `cold_batch` of each domain, which cost no
    sandbox; learnt is their likelihood, or the KL to the teacher there (`cold_objective`). Each of the
    `steps` has `prompts` tasks of each domain, `group` rollouts of each, and `epochs` updates on them.
    `cold_batch` and `prompts` may differ between experts: they are the shares of the mixture. With `mean:
    domain` each domain weighs the same, however many tokens it has. `lr` is 5e-5 where it is not given, and
    with adapters 1e-4.
    `objective`: the KL from student to teacher over the whole vocabulary (`reverse-kl`), over the `top_k`
    tokens of one of them (`support`) and a bucket for all others, or of the sampled token alone
    (`policy-gradient`): its advantage is `strength` times log teacher - log student, cut at
    `difference_clip`, plus, with `rewards`, that of reinforcement; its ratio is clipped as there, by the
    token. Where these are not given, a policy gradient has `rewards`, and with them a `group` is 8.
    `teacher`: the domain's own expert, or of all the one that did best on like tasks when evaluated.
    With `overlap_k`, a token counts (share of the k likeliest tokens that both have)^`overlap_power`; what
    follows `truncate_after` tokens in a row with less than `truncate_below` in common counts nothing.
    """

    cold_steps: int = 0
    cold_batch: int = 32
    cold_objective: Literal["likelihood", "kl"] = "likelihood"
    steps: int = 30
    prompts: int = 16
    objective: Literal["reverse-kl", "top-k", "policy-gradient"] = "policy-gradient"
    rewards: bool = Field(default_factory=lambda given: given.get("objective") == "policy-gradient")
    group: int = Field(default_factory=lambda given: 8 if given.get("rewards") else 1, ge=1)
    epochs: int = 1
    lr: float | None = Field(default=None, ge=0)
    warmup: int = 5
    final_lr: float = 0.2
    temperature: float = 1.0
    teacher: Literal["domain", "best"] = "domain"
    mean: Literal["token", "domain"] = "token"
    top_k: int = Field(default=32, ge=1)
    support: Literal["teacher", "student"] = "teacher"
    strength: float = Field(default=1.0, gt=0)
    difference_clip: float = Field(default=5.0, gt=0)
    clip_low: float = 0.2
    clip_high: float = 0.28
    overlap_k: int = Field(default=0, ge=0)
    overlap_power: float = Field(default=1.0, ge=0)
    truncate_after: int = Field(default=0, ge=0)
    truncate_below: float = Field(default=0.5, ge=0, le=1)
    checkpoint_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _check_parts(self) -> "DistillSettings":
        if self.rewards and (self.objective != "policy-gradient" or self.group < 2):
            raise ValueError(
                "rewards are compared in the group of a task, and added to an advantage: set"
                " objective: policy-gradient, and group: 2 or more; or rewards: false"
            )
        if self.truncate_after and not self.overlap_k:
            raise ValueError("truncate_after counts tokens of little overlap: set overlap_k, too")
        return self


_RATES: Mapping[type[Settings], tuple[float, float]] = {
    SftSettings: (1e-5, 1e-4),
    RlSettings: (1e-6, 1e-5),
    DistillSettings: (5e-5, 1e-4),
}
"""Learning rates of all weights, and of adapters."""


def learning_rate(
    settings: SftSettings | RlSettings | DistillSettings, lora: LoraSettings | None
) -> float:
    """The one that is given, or what a training of that kind takes."""
    if settings.lr is not None:
        return settings.lr
    return _RATES[type(settings)][lora is not None]


def check_balance(balance: float, lora: LoraSettings | None) -> None:
    """Raise ValueError if the routers that a load-balancing loss is about are not trained."""
    if balance and lora:
        raise ValueError(
            "balance is for routers that learn, and with lora they stay as they are: set balance: 0, or train"
            " all weights"
        )


_SHARES = ("cold_batch", "prompts")


class Preset(Settings):
    """All settings of one run but its seed and experts.

    `experts` has what differs for one expert, by its name and the section (collect, sft, rl, distill),
    such as `{swe: {sft: {steps: 200}}}`. Of distillation, which all experts share, only its `cold_batch` and
    `prompts` can differ.
    `micro_batch_tokens` bounds the padded tokens of one forward and backward pass: memory, never results. A
    larger tree is computed in parts, of which those on one path are held at once.
    `tree`: a model whose layers cannot be given token trees is trained on their branches, or is an error.
    `weighting`: a token that several branches of a tree share counts once for each of them, so that a tree is
    the mean of its branches (`path`), or as any other token does (`once`).
    `balance` weighs the load-balancing loss of a mixture of experts; its statistics are over a micro-batch.
    It is for routers that are trained, so not with `lora`.
    Without `lora` (`{}` for its defaults) all weights are trained. None of `lora`, `scale` and `optimizer` is
    about the `base` stage.
    """

    name: str
    summary: str
    model: ModelSettings = ModelSettings()
    base: BaseTrainingSettings = BaseTrainingSettings()
    collect: CollectSettings = CollectSettings()
    sft: SftSettings = SftSettings()
    student: SftSettings = SftSettings()
    rl: RlSettings = RlSettings()
    distill: DistillSettings = DistillSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    sandbox: str = "local"
    sandbox_options: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleSettings = ScheduleSettings()
    serve: ServeSettings = ServeSettings()
    max_new_tokens: int = 48
    concurrency: int = 48
    micro_batch_tokens: int = 8192
    tree: Literal["auto", "required"] = "auto"
    weighting: Literal["path", "once"] = "path"
    balance: float = Field(default=0.0, ge=0)
    scale: ScaleSettings = ScaleSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    lora: LoraSettings | None = None
    expert_threads: int = 1
    shared_threads: int = 2
    synthesis: dict[str, dict[str, Any]] = Field(default_factory=dict)
    experts: dict[str, dict[Literal["collect", "sft", "rl", "distill"], dict[str, Any]]] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _check_experts(self) -> "Preset":
        for name, sections in self.experts.items():
            if shared := sections.get("distill", {}).keys() - _SHARES:
                raise ValueError(
                    f"experts.{name}.distill: {', '.join(sorted(shared))} cannot differ between experts;"
                    f" only {' and '.join(_SHARES)} can"
                )
            check_staleness(self.for_expert(name).rl, self.serve)
            check_weighting(self.for_expert(name).rl, self.weighting)
        check_staleness(self.rl, self.serve)
        check_weighting(self.rl, self.weighting)
        check_balance(self.balance, self.lora)
        return self

    def for_expert(self, name: str) -> "Preset":
        """The preset with what differs for one expert put in; what follows from that follows anew."""
        changed: dict[str, Any] = {}
        for section, changes in self.experts.get(name, {}).items():
            own = getattr(self, section)
            given = own.model_dump(exclude_unset=True) | changes
            changed[section] = type(own).model_validate(given)
        return self.model_copy(update=changed)


def preset_names() -> tuple[str, ...]:
    """The presets that ship with katcore."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.yaml")))


def load_preset(name_or_path: str) -> Preset:
    """A shipped preset by name, or any YAML file by path.

    Raises:
        ConfigError: no such preset, not YAML, or a key or value that does not fit; says where.
    """
    path = _PRESETS / f"{name_or_path}.yaml"
    if not path.exists():
        path = Path(name_or_path)
        if path.suffix not in {".yaml", ".yml"} or not path.is_file():
            raise ConfigError(
                f"no preset named {name_or_path!r}; choose one of: {', '.join(preset_names())},"
                " or give the path of a YAML file"
            )
    preset = load_yaml(path, Preset, name=path.stem)
    if not preset.model.path:
        return preset
    folder = str((path.parent / Path(preset.model.path).expanduser()).resolve())
    return preset.model_copy(update={"model": preset.model.model_copy(update={"path": folder})})


SettingsT = TypeVar("SettingsT", bound=Settings)


def load_yaml(path: Path, kind: type[SettingsT], **given: Any) -> SettingsT:
    """The settings of a YAML file; `given` are those that it does not hold.

    Raises:
        ConfigError: not there, not YAML, or a key or value that does not fit; says where.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a mapping of settings, found {content!r}")
        return kind.model_validate(given | content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(map(_said, error.errors()))}") from error


def _said(error: ErrorDetails) -> str:
    """Where in the file, if not in the whole of it, and what."""
    message = error["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, (".".join(map(str, error["loc"])), message)))


def home() -> Path:
    """Where runs, artefacts and caches live: $KATCORE_HOME, or `.kat` in the current folder."""
    return Path(os.environ.get("KATCORE_HOME", ".kat")).resolve()


def ledger_url() -> str:
    """Where leases of sandboxes are kept: $KATCORE_LEDGER; `leases.db` in katcore's home if it is empty.

    An SQLAlchemy URL, such as `postgresql+psycopg2://user:password@host/database`: for runs on several
    machines.
    """
    return os.environ.get("KATCORE_LEDGER", "")


def run_name() -> str:
    """The scheduled run that this process works for: $KATCORE_RUN, set by the DAG; empty elsewhere."""
    return os.environ.get("KATCORE_RUN", "")


class Rank(NamedTuple):
    """One of `world` processes that train together, which meet at a file, or as torch's variables say."""

    rank: int
    world: int
    meet_at: str


def rank_of_process() -> Rank | None:
    """Which process of a training this is, None if it is the only one: RANK and WORLD_SIZE, as torchrun sets.

    Those that `kat` starts meet at a file, $KATCORE_MEET_AT; without it, as torch's own variables say.
    """
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world is None:
        return None
    return Rank(int(rank), int(world), os.environ.get("KATCORE_MEET_AT", ""))


def is_first_process() -> bool:
    """Whether this is the process of a training that writes and reports, or the only one."""
    found = rank_of_process()
    return found is None or found.rank == 0


def blocked_plugins() -> frozenset[str]:
    """Plugins not to load: $KATCORE_PLUGINS_BLOCKED, names joined by commas."""
    return frozenset(filter(None, os.environ.get("KATCORE_PLUGINS_BLOCKED", "").split(",")))


def secret(variable: str) -> str:
    """A key from the environment; nothing else may hold one.

    `airflow:NAME` is the password of the Airflow connection NAME, as Airflow's own variable AIRFLOW_CONN_NAME
    gives it (JSON or URI).

    Raises:
        ConfigError: it is not set.
    """
    kind, _, name = variable.rpartition(":")
    source = f"AIRFLOW_CONN_{name.upper()}" if kind == "airflow" else variable
    value = os.environ.get(source, "")
    if value and kind == "airflow":
        value = _password(value)
    if not value:
        raise ConfigError(f"no key: set the environment variable {source}")
    return value


def _password(connection: str) -> str:
    if connection.lstrip().startswith("{"):
        return str(json.loads(connection).get("password", ""))
    return unquote(urlsplit(connection).password or "")


def environment() -> dict[str, str]:
    """A copy of the process environment, to start other processes with.

    Threads that wait for each other sleep, unless OMP_WAIT_POLICY says otherwise: stages share cores with
    each other and with sandboxes, and beside one busy process, two threads that spin are slower than one.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
