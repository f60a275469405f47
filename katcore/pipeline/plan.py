"""The plan of a run: which stages there are, what each reads, and the key of each.

A key is the hash of the stage's config, its inputs' keys, and the code that it runs: the plugin packages
whose offers it uses, and the parts of katcore it is made of. Equal keys mean equal work.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

from katcore.config import Preset, learning_rate
from katcore.errors import ConfigError
from katcore.inference import source
from katcore.plugin import Plugins
from katcore.schema.expert import Expert

UNIFIED = "unified"
MODES = ("greedy", "sampled")
"""How every model is evaluated; the first is the headline."""
_ROLLOUT = (
    "rollout", "proxy", "trajectory", "sandbox", "schema", "inference", "pipeline.rollouts",
)  # fmt: skip
_TRAINED = ("balance", "lora", "optimizer", "precision", "weighting")
"""What of a preset matters to whatever is trained."""
_CODE: Mapping[str, tuple[str, ...]] = {
    "base": ("train", "inference"),
    "synthesize": ("dataset", "sandbox"),
    "collect": _ROLLOUT,
    "sft": ("train",),
    "rl": (
        "train",
        *_ROLLOUT,
        "pipeline.engines",
        "pipeline.stream",
        "pipeline.frontier",
        "pipeline.learner",
        "pipeline.prefill",
    ),
    "distill": ("train", *_ROLLOUT, "pipeline.engines", "pipeline.stream", "pipeline.route"),
    "evaluate": (*_ROLLOUT, "pipeline.engines"),
    "gate": ("pipeline.statistic",),
    "register": ("registry",),
}


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of a run. `id` is `<expert>.<stage>`, or the stage's name where all experts share it."""

    id: str
    stage: str
    expert: str = ""
    inputs: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    offers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a run, in an order in which they can run."""

    preset: Preset
    seed: int
    experts: tuple[str, ...]
    stages: Mapping[str, StageSpec]
    keys: Mapping[str, str]

    def find(self, stage_id: str) -> StageSpec:
        """The stage of that id, or a ConfigError that lists all."""
        if stage_id not in self.stages:
            raise ConfigError(
                f"no stage {stage_id!r} in this run; it has: {', '.join(self.stages)}"
            )
        return self.stages[stage_id]


def build_plan(
    preset: Preset, plugins: Plugins, *, experts: Iterable[str] = (), seed: int = 0
) -> Plan:
    """The plan for a preset; no experts named means all that are installed.

    Raises:
        PluginError: an expert or one of its offers is not installed.
        ConfigError: no expert is installed at all.
    """
    names = tuple(sorted(set(experts))) or tuple(plugins.experts())
    if not names:
        raise ConfigError(
            "no expert is installed; install a package that offers one, see `kat plugins`"
        )
    for name in (*preset.synthesis, *preset.experts):
        plugins.find("expert", name)
    specs = [StageSpec("base", "base", config=_base_config(preset) | {"seed": seed})]
    for name in names:
        plugins.find("expert", name)
    chosen = [plugins.experts()[name] for name in names]
    for expert in chosen:
        others = [item for item in chosen if item != expert and _may_teach_all(preset)]
        specs += _expert_stages(expert, others, preset.for_expert(expert.name), seed)
    if _may_teach_all(preset):
        specs.sort(key=lambda spec: spec.stage in {"evaluate", "register"})
    specs += _unified_stages(chosen, preset, seed)
    keys: dict[str, str] = {}
    for spec in specs:
        keys[spec.id] = _key(spec, keys, plugins)
    return Plan(preset, seed, names, {spec.id: spec for spec in specs}, keys)


def _may_teach_all(preset: Preset) -> bool:
    """Whether an expert may teach tasks of other domains: then it is evaluated on those, too."""
    return preset.distill.teacher == "best"


def _expert_stages(
    expert: Expert, others: list[Expert], preset: Preset, seed: int
) -> list[StageSpec]:
    """The stages of an expert, which is evaluated on the tasks of `others`, too."""
    name = expert.name
    rollout, offers = _rollout_config(expert, preset, seed)
    synthesis = {**expert.synthesis, **preset.synthesis.get(name, {})}

    def stage(kind: str, *inputs: str, config: Mapping[str, Any], uses: Any = ()) -> StageSpec:
        ids = tuple(item if item == "base" or "." in item else f"{name}.{item}" for item in inputs)
        return StageSpec(f"{name}.{kind}", kind, name, ids, config, tuple(uses))

    made_by = (("synthesizer", expert.synthesizer), ("sandbox", preset.sandbox))
    asked = [_rollout_config(item, preset, seed) for item in others]
    evaluation = rollout | _dump(preset, "evaluate", "serve")
    if others:
        evaluation["others"] = [config for config, _ in asked]
    return [
        stage("synthesize", config={"options": synthesis, "seed": seed}, uses=made_by),
        stage(
            "collect", "base", "synthesize", config=rollout | _dump(preset, "collect"), uses=offers
        ),
        stage("sft", "base", "collect", config=_dump(preset, "sft", *_TRAINED) | {"seed": seed}),
        stage(
            "rl",
            "sft",
            "synthesize",
            "collect",
            config=rollout | _dump(preset, "rl", "serve", *_TRAINED),
            uses=offers,
        ),
        stage(
            "evaluate",
            "base",
            "sft",
            "rl",
            "synthesize",
            *(f"{item.name}.synthesize" for item in others),
            config=evaluation,
            uses=dict.fromkeys((*offers, *(offer for _, used in asked for offer in used))),
        ),
        stage("register", "rl", "evaluate", config={}),
    ]


def _unified_stages(experts: list[Expert], preset: Preset, seed: int) -> list[StageSpec]:
    rollouts = [_rollout_config(expert, preset, seed) for expert in experts]
    rollout = {"experts": [config for config, _ in rollouts]}
    offers = tuple(dict.fromkeys(offer for _, used in rollouts for offer in used))
    names = [expert.name for expert in experts]
    own = {name: _dump(preset.for_expert(name), "distill") for name in names}

    def of(kind: str) -> list[str]:
        return [f"{name}.{kind}" for name in names]

    def stage(kind: str, inputs: list[str], config: Mapping[str, Any], uses: Any = ()) -> StageSpec:
        return StageSpec(f"{UNIFIED}.{kind}", kind, "", tuple(inputs), config, uses)

    prefix = UNIFIED
    return [
        stage(
            "sft", ["base", *of("collect")], _dump(preset, "student", *_TRAINED) | {"seed": seed}
        ),
        stage(
            "distill",
            [
                f"{prefix}.sft",
                *of("rl"),
                *of("synthesize"),
                *(of("evaluate") if _may_teach_all(preset) else ()),
            ],
            rollout | _dump(preset, "distill", "serve", *_TRAINED) | {"by_expert": own},
            offers,
        ),
        stage(
            "evaluate",
            [f"{prefix}.distill", *of("synthesize")],
            rollout | _dump(preset, "evaluate", "serve"),
            offers,
        ),
        stage("gate", [f"{prefix}.evaluate", *of("evaluate")], _dump(preset, "evaluate")),
        stage("register", [f"{prefix}.distill", f"{prefix}.gate"], {}),
    ]


def _rollout_config(
    expert: Expert, preset: Preset, seed: int
) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    config = {
        "scaffold": [expert.scaffold, expert.scaffold_options],
        "verifier": [expert.verifier, expert.verifier_options],
        "formatter": [expert.formatter, expert.formatter_options],
        "sandbox": [preset.sandbox, preset.sandbox_options],
        "max_new_tokens": preset.max_new_tokens,
        "seed": seed,
    }
    offers = (
        ("dataset", expert.dataset),
        ("sandbox", preset.sandbox),
        ("scaffold", expert.scaffold),
        ("verifier", expert.verifier),
        ("formatter", expert.formatter),
    )
    return config, offers


def _base_config(preset: Preset) -> dict[str, Any]:
    """With what tells one state of a folder that it starts from from another."""
    found = _dump(preset, "model", "base")
    if preset.model.kind == "folder":
        found["files"] = source.files_of(Path(preset.model.path))
    return found


def _dump(preset: Preset, *names: str) -> dict[str, Any]:
    content = preset.model_dump(mode="json")
    for section in content.values():
        if isinstance(section, dict):
            section.pop("checkpoint_every", None)  # changes what a kill costs, and no result
    for name in ("sft", "student", "rl", "distill"):
        content[name]["lr"] = learning_rate(getattr(preset, name), preset.lora)
    # All else of `scale` changes no more than rounding.
    content["precision"] = preset.scale.precision
    return {name: content[name] for name in names}


def _key(spec: StageSpec, keys: Mapping[str, str], plugins: Plugins) -> str:
    packages = sorted({plugins.find(kind, name).package for kind, name in spec.offers})
    content = {
        "stage": spec.stage,
        "expert": spec.expert,
        "config": spec.config,
        "inputs": {name: keys[name] for name in spec.inputs},
        "code": {name: code_hash(name) for name in packages}
        | {f"katcore.{name}": code_hash(f"katcore.{name}") for name in _CODE[spec.stage]}
        | {"stage": code_hash(f"katcore.pipeline.{spec.stage}")},
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def code_hash(name: str) -> str:
    """Of all files of a package, or of one module."""
    spec = util.find_spec(name)
    if spec is None or spec.origin is None:
        return ""
    origin = Path(spec.origin)
    paths = origin.parent.rglob("*") if origin.name == "__init__.py" else [origin]
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(origin.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
