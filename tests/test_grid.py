import math

import pytest
import torch

from dit_accel.errors import GridMismatchError, OptionError
from dit_accel.grid import RASTER, TokenOrder, as_grid, check_tokens, coordinates

ORDERS = [
    pytest.param(RASTER, id="raster"),
    pytest.param(TokenOrder((2, 4, 4)), id="boxes"),
    pytest.param(TokenOrder((3, 5, 1)), id="bars"),
    pytest.param(TokenOrder((1, 2, 3), (2, 3, 1)), id="dilated"),
    pytest.param(TokenOrder((4, 16, 16)), id="larger-than-the-grid"),
]
GRIDS = [(1, 1, 63), (1, 13, 11), (13, 7, 9), (21, 5, 6), (4, 8, 8), (1, 1, 1)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations(order, grid):
    forward, back = order.permutation(grid), order.inverse(grid)
    raster = torch.arange(math.prod(grid))
    assert torch.equal(forward.sort().values, raster)
    assert torch.equal(forward[back], raster)
    assert torch.equal(back[forward], raster)


def test_raster_changes_nothing():
    assert torch.equal(RASTER.permutation((3, 4, 5)), torch.arange(60))


def test_tiles_come_one_after_the_other():
    grid, tile = (4, 8, 12), (2, 4, 4)
    blocks = TokenOrder(tile).permutation(grid).view(-1, math.prod(tile))
    for x, size in zip(coordinates(blocks, grid), tile, strict=True):
        first = x.amin(1)
        assert (first % size == 0).all()
        assert torch.equal(x.amax(1), first + size - 1)


@pytest.mark.parametrize("grid", [(4, 8, 12), (5, 7, 9), (1, 13, 11)], ids=str)
@pytest.mark.parametrize("tile", [(2, 4, 4), (2, 3, 1)], ids=str)
def test_successive_tiles_are_neighbours(grid, tile):
    """The walk moves by one tile, along one axis."""
    raster = TokenOrder(tile).permutation(grid)
    at = torch.stack([x // n for x, n in zip(coordinates(raster, grid), tile, strict=True)], -1)
    steps = (at[1:] - at[:-1]).abs().sum(-1)
    assert steps.max() == 1


def test_dilation_groups_lie_together():
    _, _, w = coordinates(TokenOrder((1, 1, 4), (1, 1, 3)).permutation((1, 1, 11)), (1, 1, 11))
    assert w.tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8]


@pytest.mark.parametrize(
    ("given", "grid"), [((5,), (1, 1, 5)), ((3, 4), (1, 3, 4)), ([2, 3, 4], (2, 3, 4))], ids=str
)
def test_as_grid(given, grid):
    assert as_grid(given) == grid


@pytest.mark.parametrize("given", [(), (0, 3, 4), (2, -1), (1, 2, 3, 4)], ids=str)
def test_no_grid(given):
    with pytest.raises(OptionError, match="no token grid"):
        as_grid(given)


def test_tokens_that_the_grid_does_not_explain():
    check_tokens(32760 + 512, (21, 30, 52), 512)
    with pytest.raises(GridMismatchError, match=r"got 33272 .* 21x30x52 explains 32760 .*=512"):
        check_tokens(33272, (21, 30, 52), 0)
    with pytest.raises(GridMismatchError, match="patch size"):
        check_tokens(100, (21, 30, 52), 0)
