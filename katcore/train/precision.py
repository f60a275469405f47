"""What passes compute in: products below the vocabulary projection in bfloat16, all else in float32.

Weights stay as they are, and the optimizer's in float32. Those of a frozen model may be `narrow`: what
autocast would round at each product is then rounded once, so that its numbers are the same bit by bit.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


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


def _in_bfloat16(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    is_training = kwargs.get("past_key_values") is None
    with torch.autocast(kwargs["input_ids"].device.type, torch.bfloat16, enabled=is_training):
        return forward(*args, **kwargs)
