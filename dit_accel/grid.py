"""Where tokens are: the (T, H, W) grid of a video or image, and the orders in which to visit it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

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


@dataclass(frozen=True)
class HilbertOrder(TokenOrder):
    """Order along a generalised Hilbert curve, so that any run of tokens is a compact region.

    Successive tokens are neighbours on the grid, but for a diagonal step where sizes are odd. The
    curve is that of `gilbert <https://github.com/jakubcerveny/gilbert>`_, which PSA and Rectified
    SpaAttn use, along the longest axis first. ``tile`` and ``dilation`` have no meaning here.
    """

    @property
    def is_raster(self) -> bool:
        """False."""
        return False

    def permutation(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the raster index of each token of the curve; see `TokenOrder.permutation`."""
        return _hilbert_permutation(grid).to(device)


HILBERT = HilbertOrder()

IMAGE_PATCHES = TokenOrder((1, 8, 8))
"""Patches of 8 x 8 tokens, PISA's order on images; those at the far borders are cut short."""


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


_Vector = tuple[int, int, int]


@lru_cache(maxsize=32)
def _hilbert_permutation(grid: Grid) -> Tensor:
    t, h, w = grid
    axes = [(w, 0, 0), (0, h, 0), (0, 0, t)]
    longest = max((0, 1, 2), key=lambda axis: sum(axes[axis]))
    major = axes.pop(longest)
    return torch.tensor([x + w * (y + h * z) for x, y, z in _curve((0, 0, 0), major, *axes)])


def _curve(o: _Vector, a: _Vector, b: _Vector, c: _Vector) -> Iterator[_Vector]:
    """Yield the cells of the box at corner ``o`` with edges ``a`` (major), ``b`` and ``c``.

    Edges lie along the axes and may point backward. The walk begins at ``o`` and ends at the far
    end of ``a``.
    """
    sizes = [abs(sum(edge)) for edge in (a, b, c)]
    if 0 in sizes:
        return
    if sorted(sizes)[1] == 1:
        longest = (a, b, c)[sizes.index(max(sizes))]
        step = _unit(longest)
        for _ in range(max(sizes)):
            yield o
            o = _add(o, step)
        return
    size_a, size_b, size_c = sizes
    (a1, a2), (b1, b2), (c1, c2) = _halves(a), _halves(b), _halves(c)
    to_a, to_b, to_c = (_add(edge, _negative(_unit(edge))) for edge in (a, b1, c1))
    pieces: list[tuple[_Vector, _Vector, _Vector, _Vector]]
    if 2 * size_a > 3 * size_b and 2 * size_a > 3 * size_c:
        pieces = [(o, a1, b, c), (_add(o, a1), a2, b, c)]
    elif 3 * size_b > 4 * size_c:
        turn = _add(o, to_a, to_b)
        pieces = [(o, b1, c, a1), (_add(o, b1), a, b2, c), (turn, _negative(b1), c, _negative(a2))]
    elif 3 * size_c > 4 * size_b:
        turn = _add(o, to_a, to_c)
        pieces = [(o, c1, a1, b), (_add(o, c1), a, b, c2), (turn, _negative(c1), _negative(a2), b)]
    else:
        end_c = _add(c, _negative(_unit(c)))
        pieces = [
            (o, b1, c1, a1),
            (_add(o, b1), c, a1, b2),
            (_add(o, to_b, end_c), a, _negative(b1), _negative(c2)),
            (_add(o, to_a, b1, end_c), _negative(c), _negative(a2), b2),
            (_add(o, to_a, to_b), _negative(b1), c1, _negative(a2)),
        ]
    for piece in pieces:
        yield from _curve(*piece)


def _halves(edge: _Vector) -> tuple[_Vector, _Vector]:
    """Split an edge in two, the first half even where the edge is longer than 2."""
    x, y, z = edge
    half = (x // 2, y // 2, z // 2)
    if sum(half) % 2 and abs(sum(edge)) > 2:
        half = _add(half, _unit(edge))
    return half, _add(edge, _negative(half))


def _unit(edge: _Vector) -> _Vector:
    x, y, z = edge
    return (x > 0) - (x < 0), (y > 0) - (y < 0), (z > 0) - (z < 0)


def _add(*vectors: _Vector) -> _Vector:
    x, y, z = map(sum, zip(*vectors, strict=True))
    return x, y, z


def _negative(vector: _Vector) -> _Vector:
    x, y, z = vector
    return -x, -y, -z
