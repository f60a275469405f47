"""A model as the settings have it trained: with adapters, in a precision, with activations computed again."""

import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from katcore.config import Preset
from katcore.settings import ScaleSettings
from katcore.train import ranks
from katcore.train.policy import load_policy
from katcore.train.precision import compute_in_bfloat16
from katcore.train.scattered import scatter


def load_trainable(folder: Path, preset: Preset, seed: int) -> Any:
    """The model of a folder, as a preset's `lora` and `scale` say."""
    model = _placed(lambda: _adapted(folder, preset, seed), preset.scale)
    if preset.scale.recompute and preset.scale.zero < 3:  # which does so anyway
        recompute(model)
    if preset.scale.precision == "bfloat16":
        compute_in_bfloat16(model)
    return model


def load_frozen(folder: Path, scale: ScaleSettings, *, beside: Any) -> Any:
    """The model of a folder that is only looked at, `beside` one that is trained."""

    def load() -> Any:
        return load_policy(folder).requires_grad_(False)

    return _placed(load, scale, beside)


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
