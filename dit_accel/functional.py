"""Patterns and attention without a pipeline: masks of the static methods."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import as_grid
from dit_accel.methods.base import AttentionMethod, StaticMethod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def attention_mask(
    method: str | AttentionMethod, *, grid: tuple[int, ...], text_length: int = 0
) -> Tensor:
    """Return the pairs that a static method keeps: its definition, written out.

    Args:
        method: a method object, or the name of a method to take with its default options.
        grid: video (or image) tokens as (T, H, W); (H, W) and (N,) get leading ones.
        text_length: text tokens behind the video; they see, and are seen by, everything.

    Returns:
        Bool ``[N, N]``, N = T*H*W + text_length: whether the query (row) sees the key (column).
        Video tokens are in raster order (t, then h, then w). It takes N * N bytes and several
        times that while it is made, so keep to small grids; `block_mask` serves large ones.

    Raises:
        OptionError: if the pattern depends on the values of query and key, if the method or the
            grid is impossible, or if a window does not fit the grid.
    """
    static, layout = _static(method), _layout(grid, text_length)
    return static.attention_mask(layout)


def block_mask(
    method: str | AttentionMethod,
    *,
    grid: tuple[int, ...],
    text_length: int = 0,
    block_size: int | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Return a static method's pattern as FlexAttention takes it.

    Args:
        method: a method object, or the name of a method to take with its default options.
        grid: video (or image) tokens as (T, H, W); (H, W) and (N,) get leading ones.
        text_length: text tokens behind the video; they see, and are seen by, everything.
        block_size: tokens per block, a power of two; None for the method's own.
        device: where the lists live.

    Returns:
        `BlockMask` over N = T*H*W + text_length tokens: first the video in the method's own order
        (``method.token_order(grid).permutation(grid)`` lists the raster indices in that order;
        Radial's is raster), then the text. ``kv_indices`` are the blocks to mask with its
        ``mask_mod``, ``full_kv_indices`` those that are wholly kept.

    Raises:
        OptionError: as in `attention_mask`.
    """
    static, layout = _static(method), _layout(grid, text_length)
    if block_size is not None:
        static = replace(static, block_size=block_size)
    return static.plan_block_sparse(layout, static.token_order(layout.grid), device).block_mask


def _static(method: str | AttentionMethod) -> StaticMethod:
    from dit_accel.registry import resolve_method

    resolved = resolve_method(method)
    if not isinstance(resolved, StaticMethod):
        raise OptionError(
            f"method {resolved.name!r} has no fixed mask: masks exist for methods whose pattern "
            "follows from the grid alone, such as 'radial' and 'gna'."
        )
    return resolved


def _layout(grid: tuple[int, ...], text_length: int) -> TokenLayout:
    if text_length < 0:
        raise OptionError(f"text_length={text_length} must not be negative.")
    return TokenLayout(as_grid(grid), text_length)
