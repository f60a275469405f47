"""A model as the settings have it trained: with adapters, in a precision, with activations computed again."""

import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from katcore.config import Preset
from katcore.errors import StageError
from katcore.settings import ScaleSettings
from katcore.train import ranks
from katcore.train.policy import load_policy
from katcore.train.precision import compute_in_bfloat16, narrow
from katcore.train.scattered import scatter
from katcore.train.support import takes_trees


def load_trainable(folder: Path, preset: Preset, seed: int) -> Any:
    """The model of a folder, as a preset's `lora` and `scale` say."""

    def load() -> Any:
        model = _adapted(folder, preset, seed)
        if preset.scale.precision == "bfloat16":
            compute_in_bfloat16(model)
        return model

    model = _placed(load, preset.scale)
    if preset.scale.recompute and preset.scale.zero < 3:  # which does so anyway
        recompute(model)
    return model


def load_frozen(folder: Path, preset: Preset, *, beside: Any) -> Any:
    """The model of a folder that is only looked at, `beside` one that is trained.

    It is held and computes as `scale` says, and is given trees or branches as `tree` says (`frozen`).

    Raises:
        StageError: it needs branches and trees are required, or it scales its logits.
    """

    def load() -> Any:
        model = load_policy(folder).requires_grad_(False)
        try:
            takes_trees(model, preset.tree)  # while it is in float32, in which that is seen
        except StageError as error:
            raise StageError(f"{folder}: {error}") from error
        if preset.scale.precision == "bfloat16":
            narrow(model)
            compute_in_bfloat16(model)
        return model

    return _placed(load, preset.scale, beside)


def load_sampler(folder: Path, preset: Preset, seed: int) -> Any:
    """The model that `load_trainable` trains, whole and by itself, for an engine that gets new weights."""
    return _adapted(folder, preset, seed).to(ranks.device(preset.scale.device))


def _adapted(folder: Path, preset: Preset, seed: int) -> Any:
    model = load_policy(folder)
    if preset.lora:
        import_module("katcore.train.lora").add_adapters(model, preset.lora, seed)
    return model


def _placed(load: Callable[[], Any], scale: ScaleSettings, beside: Any = None) -> Any:
    """A model where it computes: whole, or scattered."""
    device = ranks.device(scale.device)  # first: NCCL has processes wait on the GPU that is set
    if scale.zero < 3:
        return load().to(device)
    with ranks.in_turn(scale.processes):  # a machine's memory need not hold several whole ones
        model = load()
        scatter(model, scale, beside=beside)
    return model


def recompute(model: Any) -> None:
    """Keep the inputs of layers only, and compute the rest again on the way back.

    Not by transformers' switch, which is for models in training mode and takes away the keys and values that
    an engine reads of the same model while it samples.
    """
    for layer in model.base_model.layers:
        layer.forward = functools.partial(_again, layer.forward)


def _again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
