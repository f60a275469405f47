"""What passes compute in: products below the vocabulary projection in bfloat16, all else in float32.

A model that is trained keeps weights in float32, which are rounded for each pass: by autocast, and here those
of experts, for autocast does not know transformers' `grouped_mm`, which computes in what weights are held in.
A frozen one may have them rounded once and for all (`narrow`). That is the same bit by bit, so that a teacher
with the student's weights says what the student says.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def compute_in_bfloat16(model: Any) -> None:
    """Have the layers, which are still whole, multiply in bfloat16.

    Not for an engine that samples: it has keys and values of its own, in float32.
    """
    inner = model.base_model
    for module in inner.modules():
        if _experts(module):
            module.forward = functools.partial(_rounded, module, module.forward)
    inner.forward = functools.partial(_in_bfloat16, inner.forward)


@contextmanager
def as_weights_are(model: Any) -> Iterator[None]:
    """Inside, products are in the precision of the weights."""
    inner = model.base_model
    wrapped = vars(inner).get("forward")
    if not isinstance(wrapped, functools.partial) or wrapped.func is not _in_bfloat16:
        yield
        return
    (inner.forward,) = wrapped.args
    try:
        yield
    finally:
        inner.forward = wrapped


def narrow(model: Any) -> None:
    """Hold in bfloat16 what a frozen model multiplies with: its linear layers and experts."""
    for module in model.base_model.modules():
        weights = [module.weight] if isinstance(module, nn.Linear) else _experts(module)
        for weight in weights:
            weight.data = weight.data.to(torch.bfloat16)


def _experts(module: nn.Module) -> list[nn.Parameter]:
    """Weights of several in one, of sizes whose products can be grouped: with rows of 16 bytes."""
    found = [one for one in module.parameters(recurse=False) if one.dim() == 3]
    is_even = all(size % 8 == 0 for one in found for size in one.shape[1:])
    return found if is_even and not isinstance(module, nn.Conv1d) else []


def _rounded(module: Any, forward: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    if not torch.is_autocast_enabled(hidden.device.type):
        return forward(hidden, *args)
    own = {name: weight for name, weight in module._parameters.items() if weight is not None}
    try:
        # Not as parameters: gradients go through the rounding to those.
        module._parameters.update({name: own[name].to(torch.bfloat16) for name in own})
        return forward(hidden, *args)
    finally:
        module._parameters.update(own)


def _in_bfloat16(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    is_training = kwargs.get("past_key_values") is None
    with torch.autocast(kwargs["input_ids"].device.type, torch.bfloat16, enabled=is_training):
        return forward(*args, **kwargs)
