"""What the kernels compute, in plain torch and in any dtype: read this first."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.tiles import TileLists


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that ``mask`` allows.

    Args:
        query: ``[B, N, H, D]``.
        key: ``[B, M, H, D]``.
        value: ``[B, M, H, D]``.
        mask: bool, broadcastable to ``[B, H, N, M]``; True where the pair is allowed.
        scale: factor on ``query @ key``; ``D ** -0.5`` when None.

    Returns:
        The output ``[B, N, H, D]`` and the natural-log sum of exponentials ``[B, H, N]``. A query
        with no allowed key gets output 0 and log-sum -inf.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1).masked_fill((lse == float("-inf"))[..., None], 0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, value), lse


def lists_to_mask(lists: TileLists, text_length: int = 0, text_first: bool = False) -> Tensor:
    """Write tile lists out as the bool mask ``[B|1, H|1, N, N]`` that they stand for.

    Text keys are visible to all and text queries see everything; text comes after the video
    tokens, or before them with ``text_first``.
    """
    size, tokens = lists.block_size, lists.num_tokens
    batch, heads, rows, _ = lists.full_index.shape
    tiles = torch.zeros(
        batch, heads, rows, rows, size, size, dtype=torch.bool, device=lists.bits.device
    )
    columns = torch.arange(size, device=lists.bits.device)
    patterns = (lists.bits[:, :, columns // 64] >> (columns % 64)) & 1 != 0
    for b, h, row in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        full = lists.full_index[b, h, row, : lists.full_count[b, h, row]].long()
        partial = lists.partial_index[b, h, row, : lists.partial_count[b, h, row]].long()
        slots = lists.partial_slot[b, h, row, : len(partial)].long()
        tiles[b, h, row, full] = True
        tiles[b, h, row, partial] = patterns[slots]
    dense = tiles.transpose(3, 4).reshape(batch, heads, rows * size, rows * size)

    total = tokens + text_length
    first = text_length if text_first else 0
    mask = torch.ones(batch, heads, total, total, dtype=torch.bool, device=dense.device)
    mask[..., first : first + tokens, first : first + tokens] = dense[..., :tokens, :tokens]
    return mask
