"""What passes compute in: products below the vocabulary projection in bfloat16, all else in float32.

A model that is trained keeps weights in float32, which autocast rounds for each pass. A frozen one may have
them rounded once and for all (`narrow`). That is the same bit by bit, so that a teacher with the student's
weights says what the student says; but for experts by transformers' `grouped_mm`, which autocast does not
know: these compute in what they are held in.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def compute_in_bfloat16(model: Any) -> None:
    """Have the layers multiply in bfloat16.

    Not for an engine that samples: it has keys and values of its own, in float32.
    """
    inner = model.base_model
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
        for parameter in module.parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear) and parameter is module.weight
            are_experts = parameter.dim() == 3 and not isinstance(module, nn.Conv1d)
            if is_linear or are_experts:
                parameter.data = parameter.data.to(torch.bfloat16)


def _in_bfloat16(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    is_training = kwargs.get("past_key_values") is None
    with torch.autocast(kwargs["input_ids"].device.type, torch.bfloat16, enabled=is_training):
        return forward(*args, **kwargs)
