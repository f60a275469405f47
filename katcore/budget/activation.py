"""What a forward pass keeps for the backward pass, in bytes: tensor by tensor, as transformers' models do.

A norm keeps its input in float32, the input before its weight, and its output; attention queries, keys,
values, and its output twice (where it has to be laid out anew); an MLP four tensors of its width; an expert
these for each token that it sees, and its input and output. tests/budget/test_activation.py measures models
on a CPU: the estimate is above what they keep, by at most a quarter.
"""

from dataclasses import dataclass

from katcore.budget.shape import Shape
from katcore.settings import LoraSettings

_MAX_LOGITS = 1 << 25
"""Logits that a loss has at once, as the engine of training bounds them."""
_LOSS = 10
"""Float32 tensors of their size at the most: a teacher's and the student's, log-probabilities, gradients."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What passes compute in: numbers of `element` bytes.

    With `is_mixed` weights are float32 and products bfloat16: each product keeps a copy of its input, and
    what lies between products is float32, but inside of experts.
    """

    element: int = 4
    is_mixed: bool = False


def layer_bytes(shape: Shape, precision: Precision, lora: LoraSettings | None = None) -> int:
    """Of one token in the layer that keeps most."""
    element, is_mixed = precision.element, precision.is_mixed
    hidden, queries, keys = shape.hidden, shape.query_width, shape.kv_width
    kept = 2 * (4 + 2 * element) * hidden
    kept += element * (3 * queries + 2 * keys) + 4 * shape.heads
    if shape.has_head_norms:
        kept += (4 + element) * (queries + keys)
    if is_mixed:
        kept += 10 * hidden + 4 * (queries + keys)
    dense = 4 * element * shape.intermediate
    sparse = 0
    if shape.sparse_layers:
        one = element * (2 * hidden + 4 * shape.expert_intermediate)
        sparse = shape.experts_per_token * (one + 40) + 8 * shape.experts
    mlp = sparse if shape.sparse_layers == shape.layers else max(dense, sparse)
    return kept + mlp + (_adapter_bytes(shape, element, lora) if lora else 0)


def _adapter_bytes(shape: Shape, element: int, lora: LoraSettings) -> int:
    """Each adapter keeps what it makes of its input, and, if that is no float32, a float32 copy of it."""
    inputs = {
        "q_proj": shape.hidden,
        "k_proj": shape.hidden,
        "v_proj": shape.hidden,
        "o_proj": shape.query_width,
        "gate_proj": shape.hidden,
        "up_proj": shape.hidden,
        "down_proj": shape.intermediate,
    }
    names = list(inputs) if shape.sparse_layers < shape.layers else list(inputs)[:4]
    chosen = [name for name in names if lora.targets == "all-linear" or name in lora.targets]
    copies = 1 if element < 4 or lora.dropout else 0
    return sum(4 * lora.rank + 4 * inputs[name] * copies for name in chosen)


def activation_bytes(
    shape: Shape,
    tokens: int,
    precision: Precision,
    *,
    is_recomputed: bool,
    lora: LoraSettings | None = None,
) -> int:
    """Of a pass over `tokens`, and what one layer needs besides while its gradients are computed."""
    layer = layer_bytes(shape, precision, lora)
    stream = 4 if precision.is_mixed else precision.element
    kept = shape.layers * (stream * shape.hidden if is_recomputed else layer)
    once = (4 + 2 * stream) * shape.hidden + stream * shape.hidden
    return tokens * (kept + once + layer * (2 if is_recomputed else 1))


def logit_bytes(shape: Shape, tokens: int) -> int:
    """Of the loss of `tokens` trained tokens, which are taken a chunk at a time."""
    chunk = max(_MAX_LOGITS, shape.vocabulary)
    return 4 * _LOSS * min(tokens * shape.vocabulary, chunk)
