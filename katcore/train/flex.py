"""Attention of token trees on a GPU: FlexAttention, which leaves out blocks of 128 by 128 that nobody sees.

In a row that lies depth first the tokens below a token are those up to its end, so a query sees a key if it
comes after it and before the key's end.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def block_mask(ends_K: Tensor, num_queries: int) -> BlockMask:
    """What the last `num_queries` of K tokens see; `ends_K` has the place after the last token below each."""
    num_keys = len(ends_K)
    before = num_keys - num_queries

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + before
        return (key <= place) & (place < ends_K[key])

    return create_block_mask(
        sees, B=None, H=None, Q_LEN=num_queries, KV_LEN=num_keys, device=ends_K.device.type
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """softmax(scale * q k^T) v, (1, H, T, D); compiled on a GPU."""
    compute = _compiled() if query.is_cuda else flex_attention
    out: Tensor = compute(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
