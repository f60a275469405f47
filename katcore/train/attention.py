"""Attention of token trees in any Hugging Face model: exact, and without the pairs that nobody sees.

`NAME` is an implementation of transformers' attention interface. It is SDPA, except where the model is given
a `TreeMask`: then a token attends along its own path only. On the CPU each piece of it (`forest.pieces`) is
one call of the flash kernel, and what a query finds in several is put together by their log-sums, as in ring
attention (arXiv 2310.01889); backwards a piece needs only the sum over all. On a GPU it is `flex`.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
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


KeyValue = tuple[Tensor, Tensor]
"""Keys and values of some tokens in a layer, (1, H, T, D) each."""


class Past(Protocol):
    """Keys and values of tokens that are not in the batch but seen from it: a path, in stretches."""

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens each stretch has."""

    def stretches(self, layer: int, own: KeyValue) -> Sequence[KeyValue]:
        """Those of a layer; `own` are those of the batch, for whom it may concern."""


class TreeMask:
    """What the tokens of a batch of one row see: those on their path, which are given by their parents.

    They lie depth first, behind those of `past`.
    """

    def __init__(self, parents: Sequence[int], past: Past | None = None) -> None:
        self.past = past
        self._parents = parents
        self._lengths = past.lengths if past else ()
        self._num_past = sum(self._lengths)
        self._blocks: BlockMask | None = None

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """For the CPU's kernel: each has its keys in one stretch of the past, or in the batch."""
        found = cut(pieces(self._parents, self._num_past))
        return tuple(apart(found, list(accumulate(self._lengths))))

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
    seen = [(key, value)]
    if tree.past:
        seen = [*tree.past.stretches(module.layer_idx, (key, value)), *seen]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda:
        key, value = (torch.cat(part, dim=2) for part in zip(*seen, strict=True))
        out = flex.attend(query, key, value, tree.blocks(query.device), scale)
    else:
        keys, values = zip(*seen, strict=True)
        out = _TreeAttention.apply(tree.pieces, scale, query, *keys, *values)  # type: ignore[no-untyped-call]
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


def apart(found: Sequence[Piece], borders: Sequence[int]) -> Iterator[Piece]:
    """With rectangles cut where their keys cross a border."""
    for piece in found:
        first = piece.first
        for border in borders:
            if first < border < piece.last:
                yield piece._replace(first=first, last=border)
                first = border
        yield piece._replace(first=first)


class _TreeAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v over the pieces. Sums over pieces are at least float32.

    Keys, and then values, come in stretches; a piece has its keys in one.
    """

    @staticmethod
    def forward(
        ctx: Any, pieces: tuple[Piece, ...], scale: float, query: Tensor, *keys_values: Tensor
    ) -> Tensor:
        keys, values = _halves(keys_values)
        _, heads, num, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        size = values[0].shape[-1]
        out_BHTD = query.new_empty((1, num, heads, size), dtype=wide).transpose(1, 2)
        sum_BHT = query.new_empty((1, num, heads), dtype=wide).transpose(1, 2)
        for piece, stretch, where in _placed(pieces, keys):
            start, end = piece.start, piece.end
            part, log_sum = _flash(
                query[:, :, start:end],
                keys[stretch][:, :, where],
                values[stretch][:, :, where],
                0.0,
                piece.is_causal,
                scale=scale,
            )
            if piece.is_causal:
                out_BHTD[:, :, start:end] = part
                sum_BHT[:, :, start:end] = log_sum
            else:
                before = sum_BHT[:, :, start:end]
                out_BHTD[:, :, start:end].lerp_(
                    part.to(wide), (log_sum - before).sigmoid()[..., None]
                )
                before.copy_(torch.logaddexp(before, log_sum))
        out = out_BHTD.to(query.dtype)
        ctx.save_for_backward(query, out, sum_BHT, *keys_values)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, out, sum_BHT, *keys_values = ctx.saved_tensors
        given = [query, *keys_values]
        sums = [torch.zeros_like(tensor, dtype=sum_BHT.dtype) for tensor in given]
        keys, values = _halves(keys_values)
        dkeys, dvalues = _halves(sums[1:])
        for piece, stretch, where in _placed(ctx.pieces, keys):
            queries = slice(piece.start, piece.end)
            found = _flash_backward(
                grads[0][:, :, queries],
                query[:, :, queries],
                keys[stretch][:, :, where],
                values[stretch][:, :, where],
                out[:, :, queries],
                sum_BHT[:, :, queries],
                0.0,
                piece.is_causal,
                scale=ctx.scale,
            )
            sums[0][:, :, queries] += found[0]
            dkeys[stretch][:, :, where] += found[1]
            dvalues[stretch][:, :, where] += found[2]
        return (
            None,
            None,
            *(total.to(tensor.dtype) for total, tensor in zip(sums, given, strict=True)),
        )


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    num = len(tensors) // 2
    return tensors[:num], tensors[num:]


def _placed(pieces: Sequence[Piece], keys: Sequence[Tensor]) -> Iterator[tuple[Piece, int, slice]]:
    """Each piece, in which stretch its keys are, and where there."""
    starts = [0, *accumulate(key.shape[2] for key in keys)]
    for piece in pieces:
        stretch = bisect_right(starts, piece.first) - 1
        yield piece, stretch, slice(piece.first - starts[stretch], piece.last - starts[stretch])
