"""Whether a model can be given token trees: its layers have to let a token see its own path, and no more."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor

from katcore.errors import StageError
from katcore.train.attention import TreeMask
from katcore.train.policy import logits_at
from katcore.train.precision import as_weights_are

Trees = Literal["auto", "required"]
"""Whether a model that cannot be given trees is trained on their branches instead, or is an error."""

_log = logging.getLogger(__name__)
_LIMITS = ("attn_logit_softcapping", "sliding_window", "attention_chunk_size")
_PARENTS = (-1, 0, 1, 2, 1, 4)
_DEPTHS_BT = torch.tensor([[0, 1, 2, 3, 2, 3]])
_INDEX_BT = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]])
_ROUNDING = 500
"""Units of rounding that logits may be apart: 30 layers were 27, a token seen by mistake makes thousands."""


def takes_trees(model: Any, trees: Trees = "auto") -> bool:
    """Whether `model` is given trees. If not, the reason is logged, and the model remembers it.

    Raises:
        StageError: it cannot, and they are required; or something else comes after its vocabulary projection.
    """
    reason = refusal(model)
    model.is_given_branches = bool(reason)
    if reason and trees == "required":
        raise StageError(
            f"{type(model).__name__} cannot be given token trees: {reason};"
            " with `tree: auto` it is given their branches, one by one"
        )
    if reason:
        _log.warning(
            "%s is given branches, not token trees, which takes longer: %s",
            type(model).__name__,
            reason,
        )
    return not reason


def is_given_branches(model: Any) -> bool:
    """What `takes_trees` found; False of a model that it was not asked about."""
    return getattr(model, "is_given_branches", False)


def refusal(model: Any) -> str:
    """Why a model cannot be given trees, by its configuration and by trying a small one; or nothing.

    Tried in the precision of its weights, for which rounding is told from a token seen by mistake.

    Raises:
        StageError: something else comes after its vocabulary projection.
    """
    was_training, was = model.training, model.config._attn_implementation
    model.eval()
    try:
        with torch.no_grad(), as_weights_are(model):
            wanted = _of_branches(model)
            reason = _configured(model) or _tried(model, wanted)
    finally:
        model.train(was_training)
    if reason:
        model.set_attn_implementation(was)
    return reason


def _configured(model: Any) -> str:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention"}):
        return f"it has layers of the kind {' and '.join(others)}"
    for name in ("attn_logit_softcapping",) if kinds else _LIMITS:
        if value := getattr(config, name, None):
            return f"its attention has {name}={value}"
    if not getattr(model, "_supports_sdpa", False):
        return "its attention is not one that SDPA computes"
    return ""


def _of_branches(model: Any) -> Tensor:
    """Logits of the small tree's branches, each by itself."""
    ids_BT = _ids(model)[_INDEX_BT]
    wanted: Tensor = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
    depths_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    found = logits_at(model, ids_BT, depths_BT, None, torch.arange(ids_BT.numel()))
    if apart := _apart(model, found, wanted):
        raise StageError(
            f"{type(model).__name__}: its logits are {apart:.2g} apart from its vocabulary projection of the"
            " last hidden state; models that scale or cap them can neither be trained nor teach"
        )
    return wanted


def _tried(model: Any, wanted: Tensor) -> str:
    places = _INDEX_BT.flatten()
    try:
        found = logits_at(model, _ids(model)[None], _DEPTHS_BT, TreeMask(_PARENTS), places)
    except TypeError as error:
        return f"it does not pass on what its attention is told ({error})"
    if apart := _apart(model, found, wanted):
        return f"a small tree has logits that are {apart:.2g} apart from those of its branches"
    return ""


def _ids(model: Any) -> Tensor:
    ids_T = torch.arange(1, 1 + len(_PARENTS), device=model.device)
    return ids_T.remainder(model.config.get_text_config().vocab_size)


def _apart(model: Any, found: Tensor, wanted: Tensor) -> float:
    """How far they are apart, 0 where that is rounding."""
    limit = _ROUNDING * torch.finfo(model.dtype).eps * float(wanted.abs().max())
    apart = float((found - wanted).abs().max())
    return 0.0 if apart <= limit else apart
