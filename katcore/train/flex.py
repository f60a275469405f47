"""Attention of token trees on a GPU: FlexAttention, which leaves out blocks of 128 by 128 that nobody sees.

In a row that lies depth first the tokens below a token are those up to its end, so a query sees a key if it
comes after it and before the key's end.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128


def block_mask(ends_K: Tensor, num_queries: int) -> BlockMask:
    """What the last `num_queries` of K tokens see; `ends_K` has the place after the last token below each.

    The queries of a key are a row of places, so it is seen from a row of blocks: no pair of tokens is looked
    at, and it takes numbers for each pair of blocks only. What sticks out of the row is seen by nobody.
    """
    num_keys = len(ends_K)
    before = num_keys - num_queries
    places_K = torch.arange(num_keys, device=ends_K.device)
    # From each key's first query to behind its last one.
    first_K, last_K = (places_K - before).clamp(min=0), (ends_K - before).clamp(min=0)
    shape = -(-num_queries // _BLOCK), -(-num_keys // _BLOCK)
    column_K = places_K // _BLOCK
    some = _seen_from(first_K // _BLOCK, -(-last_K // _BLOCK), column_K, shape)
    whole = _seen_from(-(-first_K // _BLOCK), last_K // _BLOCK, column_K, shape) == _BLOCK

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + before
        return (key <= place) & (place < ends_K[key])

    return BlockMask.from_kv_blocks(
        *_listed((some > 0) & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(num_queries, num_keys),
    )


def _seen_from(first_K: Tensor, last_K: Tensor, column_K: Tensor, shape: tuple[int, int]) -> Tensor:
    """How many keys of each block a block of queries sees: each key by those from its first to its last."""
    rows, columns = shape
    changes = torch.zeros((rows + 1) * columns, dtype=torch.int32, device=column_K.device)
    is_seen_K = first_K < last_K
    for row_K, by in ((first_K, 1), (last_K, -1)):
        at = (row_K * columns + column_K)[is_seen_K]
        changes.index_add_(0, at, torch.full_like(at, by, dtype=torch.int32))
    return changes.view(rows + 1, columns)[:rows].cumsum(0)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries how many blocks of keys, and these first; for one batch and one head."""
    num = blocks.sum(1, dtype=torch.int32)
    order = blocks.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return num[None, None], order[None, None]


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
