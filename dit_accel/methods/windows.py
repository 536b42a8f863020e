"""Windows along the axes of the token grid: their definition, and good tiles for them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit_accel.grid import RASTER, Grid, TokenOrder, coordinates
from dit_accel.plan import EMPTY, FULL, PARTIAL

PARTIAL_COST = 1.2
"""What visiting a partly allowed pair of blocks costs, a wholly allowed one costing 1."""
CANDIDATES = 6
"""How many orders of each kind are measured after a rough ranking."""
MEASURED_ROWS = 256
"""On how many query blocks, at most, an order is measured."""


@dataclass(frozen=True)
class Axis:
    """One axis of the grid and the window on it (GNA, arXiv 2504.16922).

    Attributes:
        size: tokens along the axis.
        window: keys that a query sees, all of the query's own dilation group.
        stride: successive queries (of a dilation group) that share a window.
        dilation: tokens whose coordinates agree modulo this form a group.
        causal: whether keys after the query are hidden.
    """

    size: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def place(self, x: Tensor) -> Tensor:
        """Map coordinates to places: the dilation groups side by side, each in its own order."""
        return x % self.dilation * math.ceil(self.size / self.dilation) + x // self.dilation

    def visible(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of the first and last key that queries at coordinates ``x`` see."""
        group, index = x % self.dilation, x // self.dilation
        end = (self.size - 1 - group) // self.dilation  # index of the group's last token
        if self.causal:
            leader = torch.minimum(index // self.stride * self.stride + self.stride - 1, end)
            first, last = (leader - self.window + 1).clamp(min=0), index
        else:
            leader = torch.minimum(index // self.stride * self.stride + self.stride // 2, end)
            # A window that would stick out is pushed inward, never cut.
            first = (leader - self.window // 2).clamp(min=0).minimum(end + 1 - self.window)
            last = first + self.window - 1
        start = group * math.ceil(self.size / self.dilation)
        return start + first, start + last

    def allows(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether the query coordinates see the key coordinates, elementwise."""
        first, last = self.visible(query)
        place = self.place(key)
        return (first <= place) & (place <= last)


Axes = tuple[Axis, Axis, Axis]


def window_states(
    axes: Axes, order: TokenOrder, block_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return int8 ``[Q, K]``: EMPTY, PARTIAL or FULL for each pair of blocks in ``order``.

    Each block stands for its bounding box, so the answer is exact where blocks are boxes, and
    PARTIAL at times instead of EMPTY or FULL elsewhere.
    """
    return _pair_states(_extents(axes, order, block_size, device))


@dataclass(frozen=True)
class _Extent:
    """Bounds of each block's tokens and windows on one axis: places, int64 ``[blocks]``."""

    low: Tensor
    high: Tensor
    first_min: Tensor
    first_max: Tensor
    last_min: Tensor
    last_max: Tensor


def _extents(
    axes: Axes, order: TokenOrder, block_size: int, device: torch.device | str = "cpu"
) -> list[_Extent]:
    grid: Grid = (axes[0].size, axes[1].size, axes[2].size)
    raster = order.permutation(grid, device)
    rest = -len(raster) % block_size
    blocks = torch.cat([raster, raster[-1:].expand(rest)]).view(-1, block_size)
    extents = []
    for axis, x in zip(axes, coordinates(blocks, grid), strict=True):
        first, last = axis.visible(x)
        bounds = (*axis.place(x).aminmax(dim=-1), *first.aminmax(dim=-1), *last.aminmax(dim=-1))
        extents.append(_Extent(*bounds))
    return extents


def _pair_states(extents: list[_Extent], rows: slice = slice(None)) -> Tensor:
    """Combine the axes; ``rows`` picks query blocks."""
    overlap = inside = torch.tensor(True, device=extents[0].low.device)
    for e in extents:
        first_min, first_max = e.first_min[rows, None], e.first_max[rows, None]
        last_min, last_max = e.last_min[rows, None], e.last_max[rows, None]
        overlap = overlap & (e.high >= first_min) & (e.low <= last_max)
        inside = inside & (e.low >= first_max) & (e.high <= last_min)
    return torch.where(overlap, torch.where(inside, FULL, PARTIAL), EMPTY).to(torch.int8)


@lru_cache(maxsize=64)
def best_order(axes: Axes, block_size: int) -> TokenOrder:
    """Return the token order in which the fewest pairs of blocks have to be visited.

    The tiles tried are boxes of one block each, and slices of a bar that runs along the last axis
    and is cut into blocks wherever they end: a bar leaves no ragged tiles at its sides if its
    cross-section divides the grid. All are ranked by a count along each axis alone, and the best
    measured on the grid.
    """
    dilation: Grid = (axes[0].dilation, axes[1].dilation, axes[2].dilation)
    boxes = sorted(_boxes(axes, block_size))[:CANDIDATES]
    bars = sorted(_bars(axes, block_size))[:CANDIDATES]
    orders = [RASTER, *(TokenOrder(tile, dilation) for _, tile in boxes + bars)]
    return min(orders, key=lambda order: _cost(axes, order, block_size))


def _cost(axes: Axes, order: TokenOrder, block_size: int) -> float:
    extents = _extents(axes, order, block_size)
    step = math.ceil(len(extents[0].low) / MEASURED_ROWS)
    states = _pair_states(extents, slice(None, None, step))
    return float((states == FULL).sum() + PARTIAL_COST * (states == PARTIAL).sum())


def _boxes(axes: Axes, block_size: int) -> Iterator[tuple[float, Grid]]:
    """Yield (rough density, tile) for the boxes that hold one block."""
    for t, h, w in _factors(block_size):
        if t <= axes[0].size and h <= axes[1].size and w <= axes[2].size:
            spans = zip(axes, (t, h, w), strict=True)
            yield math.prod(_aligned_share(axis, span) for axis, span in spans), (t, h, w)


def _bars(axes: Axes, block_size: int) -> Iterator[tuple[float, Grid]]:
    """Yield (rough density, tile) for the one-token slices of bars along the last axis."""
    for t in range(1, min(axes[0].size, block_size) + 1):
        for h in range(1, min(axes[1].size, block_size // t) + 1):
            along = min(math.ceil(block_size / (t * h)), axes[2].size)
            share = _aligned_share(axes[0], t) * _aligned_share(axes[1], h)
            yield share * _loose_share(axes[2], along), (t, h, 1)


def _factors(size: int) -> Iterator[Grid]:
    powers = [2**n for n in range(size.bit_length())]
    for t in powers:
        for h in powers:
            if t * h <= size:
                yield t, h, size // (t * h)


@lru_cache(maxsize=4096)
def _aligned_share(axis: Axis, span: int) -> float:
    """Share of an axis that is visited if it is cut into pieces of ``span`` from its start."""
    first, last = _visible_in_order(axis)
    start = torch.arange(0, axis.size, span)
    end = (start + span).clamp(max=axis.size)
    first_piece, last_piece = first[start] // span, last[end - 1] // span
    visited = ((last_piece + 1) * span).clamp(max=axis.size) - first_piece * span
    return float(((end - start) * visited).sum()) / axis.size**2


@lru_cache(maxsize=4096)
def _loose_share(axis: Axis, span: int) -> float:
    """The same where pieces may start anywhere."""
    first, last = _visible_in_order(axis)
    visited = last[span - 1 :] - first[: axis.size - span + 1] + span
    return float(visited.clamp(max=axis.size).double().mean()) / axis.size


def _visible_in_order(axis: Axis) -> tuple[Tensor, Tensor]:
    x = torch.arange(axis.size)
    return axis.visible(x[axis.place(x).argsort()])
