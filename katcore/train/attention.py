"""Attention of token trees in any Hugging Face model: exact, and without the pairs that nobody sees.

`NAME` is an implementation of transformers' attention interface. It is SDPA, except where the model is given
a `TreeMask`: then a token attends along its own path only. On the CPU each piece of it (`forest.pieces`) is
one call of the flash kernel, and what a query finds in several is put together by their log-sums, as in ring
attention (arXiv 2310.01889); backwards a piece needs only the sum over all. On a GPU it is `flex`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from katcore.train import flex
from katcore.train.forest import Piece, pieces, subtree_sizes

NAME = "katcore"
PREPARED = torch.ones(1, 1, 1, 1)
"""Stands for a mask: transformers passes one of four dimensions on as it is, and makes none of its own."""

_BLOCK = 256
"""A longer causal piece is cut: the kernel leaves out what nobody sees only by blocks of 512 keys."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Past(Protocol):
    """Keys and values of tokens that are not in the batch but seen from it."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the past, and then those of the batch; (1, H, T, D)."""


class TreeMask:
    """What the tokens of a batch of one row see: those on their path, which are given by their parents.

    They lie depth first, behind `num_past` tokens of one path that `past` has.
    """

    def __init__(self, parents: Sequence[int], num_past: int = 0, past: Past | None = None) -> None:
        self.past = past
        self._parents = parents
        self._num_past = num_past
        self._blocks: BlockMask | None = None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """For the CPU's kernel."""
        return tuple(cut(pieces(self._parents, self._num_past)))

    def blocks(self, device: torch.device) -> BlockMask:
        """For FlexAttention."""
        if self._blocks is None:
            sizes = subtree_sizes(self._parents)
            ends = [token + size for token, size in enumerate(sizes)]
            ends_K = torch.tensor(ends, device=device)
            self._blocks = flex.block_mask(ends_K, len(sizes) - self._num_past)
        return self._blocks


def attend(  # noqa: PLR0913 - transformers calls it
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: TreeMask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """See `transformers.AttentionInterface`: (1, H, T, D) to (1, T, H, D)."""
    if tree is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    if dropout:
        raise ValueError("a token tree needs attention without dropout: call model.eval()")
    # Where products are in bfloat16, rotary embedding leaves float32 behind.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if tree.past:
        key, value = tree.past.extend(module.layer_idx, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        out = flex.attend(query, key, value, tree.blocks(query.device), scale)
    else:
        out = _TreeAttention.apply(query, key, value, tree.pieces, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def cut(found: Sequence[Piece], block: int = _BLOCK) -> list[Piece]:
    """With long causal pieces cut into causal blocks and the rectangles below them."""
    blocks: list[Piece] = []
    rectangles: list[Piece] = []
    for piece in found:
        if not piece.is_causal:
            rectangles.append(piece)
            continue
        apart = piece.first - piece.start
        for start in range(piece.start, piece.end, block):
            end = min(start + block, piece.end)
            blocks.append(Piece(start, end, start + apart, end + apart, True))
            if start > piece.start:
                rectangles.append(Piece(start, end, piece.first, start + apart, False))
    return blocks + rectangles


class _TreeAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v over the pieces. Sums over pieces are at least float32."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pieces: tuple[Piece, ...], scale: float
    ) -> Tensor:
        _, heads, num, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        out_BHTD = query.new_empty((1, num, heads, value.shape[-1]), dtype=wide).transpose(1, 2)
        sum_BHT = query.new_empty((1, num, heads), dtype=wide).transpose(1, 2)
        for start, end, first, last, is_causal in pieces:
            part, log_sum = _flash(
                query[:, :, start:end],
                key[:, :, first:last],
                value[:, :, first:last],
                0.0,
                is_causal,
                scale=scale,
            )
            if is_causal:
                out_BHTD[:, :, start:end] = part
                sum_BHT[:, :, start:end] = log_sum
            else:
                before = sum_BHT[:, :, start:end]
                out_BHTD[:, :, start:end].lerp_(
                    part.to(wide), (log_sum - before).sigmoid()[..., None]
                )
                before.copy_(torch.logaddexp(before, log_sum))
        out = out_BHTD.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, sum_BHT)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sum_BHT = ctx.saved_tensors
        wide = sum_BHT.dtype
        sums = [torch.zeros_like(tensor, dtype=wide) for tensor in (query, key, value)]
        for start, end, first, last, is_causal in ctx.pieces:
            queries, keys = slice(start, end), slice(first, last)
            found = _flash_backward(
                grads[0][:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
                sum_BHT[:, :, queries],
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            for whole, part, where in zip(sums, found, (queries, keys, keys), strict=True):
                whole[:, :, where] += part
        dquery, dkey, dvalue = (
            whole.to(tensor.dtype) for whole, tensor in zip(sums, (query, key, value), strict=True)
        )
        return dquery, dkey, dvalue, None, None
