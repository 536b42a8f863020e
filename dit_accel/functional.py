"""Attention and its patterns without a pipeline: one call, and the masks of static methods."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import OptionError
from dit_accel.grid import RASTER, TokenOrder, as_grid, check_tokens
from dit_accel.methods.base import AttentionMethod, StaticMethod
from dit_accel.operators import SparsePlan, check_backend, choose_operator, make_operators
from dit_accel.plan import FULL, AttentionPlan, BlockSparsePlan, DensePlan, block_mask_from_states

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: str | AttentionMethod,
    *,
    grid: tuple[int, ...],
    text_length: int = 0,
    scale: float | None = None,
    backend: str = "auto",
    precision: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend by a method, once, without a pipeline.

    Args:
        query: ``[B, N, H, D]``, any strides; ``key`` and ``value`` likewise. The first T*H*W rows
            are the video in raster order (t, then h, then w), the others text.
        method: a method object, or the name of a method to take with its default options.
        grid: video (or image) tokens as (T, H, W); (H, W) and (N,) get leading ones.
        text_length: text tokens behind the video; they see, and are seen by, everything.
        scale: softmax scale; ``D ** -0.5`` if None.
        backend: "auto" or the name of an operator.
        precision: "fp8", "int8_fp8" or "int8" to round to 8 bits, as `accelerate_pipeline` says.
        return_lse: also return the natural-log LSE of the scaled scores.

    Returns:
        Output ``[B, N, H, D]`` in the inputs' dtype; with ``return_lse`` also the LSE, float32
        ``[B, H, N]``.

    Raises:
        GridMismatchError: if grid and text length don't explain N.
        OptionError: on impossible options or shapes that disagree.
        OperatorUnavailableError: if the operator asked for can't run this.
    """
    from dit_accel.registry import resolve_method

    layout = _layout(grid, text_length)
    if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
        raise OptionError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} "
            "must have one shape, [B, N, H, D]."
        )
    check_tokens(query.shape[1], layout.grid, text_length)
    check_backend(backend, precision)
    resolved = resolve_method(method)
    if not isinstance(resolved, AttentionMethod):
        raise OptionError(f"{resolved.name!r} is a {resolved.kind}: give an attention method.")
    scale = resolved.scaled(scale, query.shape[-1])
    order = resolved.token_order(layout.grid)
    gather, scatter = None, None
    if not order.is_raster:
        text = torch.arange(layout.video_length, layout.num_tokens, device=query.device)
        gather = torch.cat([order.permutation(layout.grid, query.device), text])
        scatter = torch.argsort(gather)
        query, key, value = (x.index_select(1, gather) for x in (query, key, value))
    if isinstance(resolved, StaticMethod):
        plan = _static_plan(resolved, layout, order, query.device)
    else:
        plan = resolved.plan(AttentionCall(layout), query, key, value, order)
    if isinstance(plan, DensePlan) and not return_lse and precision is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        lse = None
    else:
        listed = _listed(plan, layout, query.device)
        operator = choose_operator(backend, make_operators(precision), listed, query).operator
        out, lse = operator.run(query, key, value, listed, scale, return_lse)
    if scatter is not None:
        out = out.index_select(1, scatter)
        lse = None if lse is None else lse.index_select(2, scatter)
    return out if lse is None else (out, lse)


@lru_cache(maxsize=4)
def _static_plan(
    method: StaticMethod, layout: TokenLayout, order: TokenOrder, device: torch.device
) -> AttentionPlan:
    """Plan once for repeated calls with the same method and tokens."""
    return method.plan_layout(layout, order, device)


def _listed(plan: AttentionPlan, layout: TokenLayout, device: torch.device) -> SparsePlan:
    """Write a dense plan as lists that hold every block; leave others as they are."""
    if not isinstance(plan, DensePlan):
        return plan
    blocks = math.ceil(layout.video_length / 128)
    states = torch.full((blocks, blocks), FULL, dtype=torch.int8, device=device)

    def everything(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= 0) & (k >= 0)

    mask = block_mask_from_states(states, 128, layout.video_length, everything)
    return BlockSparsePlan(layout, RASTER, mask)


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
