"""Where tokens are: the (T, H, W) grid of a video or image, and the orders in which to visit it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import GridMismatchError, OptionError

Grid = tuple[int, int, int]


def as_grid(grid: tuple[int, ...]) -> Grid:
    """Return ``grid`` as ``(T, H, W)`` in tokens; ``(H, W)`` and ``(N,)`` get leading ones.

    Raises:
        OptionError: if it has no axis, more than three, or an axis under 1.
    """
    axes = tuple(int(n) for n in grid)
    if not 1 <= len(axes) <= 3 or any(n < 1 for n in axes):
        raise OptionError(
            f"grid={tuple(grid)} is no token grid: give (T, H, W), each at least 1, in tokens "
            "(latent size divided by the transformer's patch size)."
        )
    return (1,) * (3 - len(axes)) + axes  # type: ignore[return-value]


def check_tokens(num_tokens: int, grid: Grid, text_length: int) -> None:
    """Raise `GridMismatchError` unless ``num_tokens`` is ``T * H * W + text_length``."""
    explained = math.prod(grid)
    if num_tokens == explained + text_length:
        return
    shape = "x".join(map(str, grid))
    rest = num_tokens - explained
    remedy = (
        f"the other {rest} may be text: pass text_length={rest}"
        if rest >= 0
        else "pass the grid after patchifying (latent size divided by the patch size)"
    )
    raise GridMismatchError(
        f"got {num_tokens} tokens, but grid {shape} explains {explained} and text_length="
        f"{text_length} explains {text_length}; {remedy}."
    )


@dataclass(frozen=True)
class TokenOrder:
    """An order of the video tokens: raster, or box-shaped tiles one after the other.

    Tiles at the far ends of an axis may be cut short; nothing is padded. Successive tiles are
    neighbours (the walk turns at every border), so that a block of consecutive tokens which
    straddles two tiles still covers a compact region.

    Args:
        tile: ``(t, h, w)`` in tokens, or None for raster order (t, then h, then w).
        dilation: per axis; tokens of the same remainder modulo the dilation come together.
    """

    tile: Grid | None = None
    dilation: Grid = (1, 1, 1)

    @property
    def is_raster(self) -> bool:
        """Whether this order leaves every token where it is."""
        return self.tile is None

    def permutation(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return int64 ``[T*H*W]``: entry g is the raster index of the g-th token in this order."""
        count = math.prod(grid)
        raster = torch.arange(count, device=device)
        if self.tile is None:
            return raster
        steps, inner = _tile_coordinates(raster, grid, self.tile, self.dilation)
        key = torch.zeros_like(raster)
        for tile_index, tiles in steps:
            # Walk back along this axis after every odd step of the walk over the outer axes.
            walked = torch.where(key % 2 == 0, tile_index, tiles - 1 - tile_index)
            key = key * tiles + walked
        for offset, extent in inner:
            key = key * extent + offset
        return torch.argsort(key)

    def inverse(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return int64 ``[T*H*W]``: the position in this order of each raster index."""
        return torch.argsort(self.permutation(grid, device))


RASTER = TokenOrder()


def coordinates(index: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Split raster indices into (t, h, w)."""
    _, height, width = grid
    return index // (height * width), index // width % height, index % width


def _tile_coordinates(
    raster: Tensor, grid: Grid, tile: Grid, dilation: Grid
) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """Per axis: (index of the tile, number of tiles), and (offset inside the tile, tile size)."""
    outer, inner = [], []
    for x, size, step, dil in zip(coordinates(raster, grid), grid, tile, dilation, strict=True):
        # Dilation groups lie side by side, each padded (in index space only) to the longest one.
        group, inside = x % dil, x // dil
        per_group = math.ceil(math.ceil(size / dil) / step)
        outer.append((group * per_group + inside // step, dil * per_group))
        inner.append((inside % step, step))
    return outer, inner
