"""Attention of FreeSwim's full pass that no other part of this package has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.call import TokenLayout, text_back, text_last
from dit_accel.grid import Grid, TokenOrder

ROWS = 4096
"""Queries that `text_attention` works on at once."""


def text_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend from image tokens to text tokens.

    Args:
        query: ``[B, N, H, D]``.
        key: ``[B, M, H, D]``, M small; likewise ``value``.
        scale: of the logits; None for ``D ** -0.5``.

    Returns:
        The output ``[B, N, H, D]`` and the natural-log sum of exponentials ``[B, H, N]``, at least
        float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs, sums = [], []
    for rows in query.split(ROWS, 1):
        logits = torch.einsum("bnhd,bmhd->bhnm", rows, key)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        sums.append(logits.logsumexp(-1))
        weights = logits.softmax(-1).to(value.dtype)
        outputs.append(torch.einsum("bhnm,bmhd->bnhd", weights, value))
    return torch.cat(outputs, 1), torch.cat(sums, 2)


def pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    order: TokenOrder,
    pool: int,
    scale: float | None,
) -> Tensor:
    """Attend to the means of ``pool`` x ``pool`` tokens of a frame, and to each text token.

    A mean stands for as many keys as it was made of: ``ln(count)`` is added to its logits.

    Args:
        query: ``[B, N, H, D]``, like ``key`` and ``value`` in rows as ``layout`` says.
        layout: the tokens.
        order: of the video tokens.
        pool: tokens along each side of a cell; cells at the far borders may be smaller.
        scale: of the logits; None for ``D ** -0.5``.
    """
    query, key, value = (text_last(x, layout) for x in (query, key, value))
    back = None
    if not order.is_raster:
        back = order.permutation(layout.grid, query.device).argsort()
    count, text = layout.video_length, layout.text_length
    keys, values = (
        torch.cat([_means(x[:, :count], layout.grid, back, pool), x[:, count:]], 1)
        for x in (key, value)
    )
    bias = None
    if text or any(side % pool for side in layout.grid[1:]):
        counts = cell_counts(layout.grid, pool).log()
        bias = torch.cat([counts, counts.new_zeros(text)]).to(query)[None, None, None]
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2)
    return text_back(output, layout, dim=1)


def cell_counts(grid: Grid, pool: int) -> Tensor:
    """Return how many tokens each cell holds, in raster order of cells, float32."""
    frames, *sides = grid
    h, w = (torch.tensor([min(pool, side - at) for at in range(0, side, pool)]) for side in sides)
    return torch.outer(h, w).flatten().repeat(frames).float()


def pooled_share(layout: TokenLayout, pool: int) -> float:
    """Return the share of (query, key) pairs that `pooled_attention` computes."""
    frames, height, width = layout.grid
    cells = frames * math.ceil(height / pool) * math.ceil(width / pool)
    return (cells + layout.text_length) / layout.num_tokens


def _means(tokens: Tensor, grid: Grid, back: Tensor | None, pool: int) -> Tensor:
    """Return the means ``[B, cells, H, D]`` of video tokens ``[B, V, H, D]``."""
    frames, height, width = grid
    batch, _, heads, size = tokens.shape
    raster = tokens if back is None else tokens.index_select(1, back)
    planes = raster.reshape(batch * frames, height, width, heads * size).permute(0, 3, 1, 2)
    means = F.avg_pool2d(planes, pool, ceil_mode=True, count_include_pad=False)
    return means.flatten(2).transpose(1, 2).reshape(batch, -1, heads, size)
