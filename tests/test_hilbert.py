import math

import pytest
import torch

from dit_accel.grid import HILBERT, IMAGE_PATCHES, HilbertOrder, TokenOrder, coordinates

GRIDS = [
    (1, 1, 1),
    (1, 1, 63),
    (7, 1, 1),
    (1, 13, 11),
    (1, 16, 40),
    (3, 5, 2),
    (13, 7, 9),
    (21, 5, 6),
    (30, 4, 5),
    (4, 8, 8),
    (2, 2, 2),
]
WAN_720P = (21, 45, 80)


def steps(grid):
    """City-block distance between successive tokens."""
    at = torch.stack(coordinates(HILBERT.permutation(grid), grid), -1)
    return (at[1:] - at[:-1]).abs().sum(-1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_permutation_and_inverse(grid):
    forward, back = HILBERT.permutation(grid), HILBERT.inverse(grid)
    raster = torch.arange(math.prod(grid))
    assert torch.equal(forward.sort().values, raster)
    assert torch.equal(forward[back], raster)
    assert forward.dtype == torch.int64


@pytest.mark.parametrize(
    "grid", [(4, 8, 8), (8, 6, 10), (2, 4, 30), (20, 4, 6), (1, 16, 40), (1, 40, 16)], ids=str
)
def test_unit_steps_on_even_boxes(grid):
    assert torch.equal(steps(grid), torch.ones(math.prod(grid) - 1, dtype=torch.int64))


@pytest.mark.parametrize("grid", [(13, 7, 9), WAN_720P], ids=str)
def test_few_and_short_diagonal_steps_on_odd_boxes(grid):
    assert (steps(grid) > 1).float().mean() < 0.05
    assert steps(grid).max() <= 4


def test_order_is_a_key_of_its_own():
    assert HilbertOrder() == HILBERT
    assert hash(HilbertOrder()) == hash(HILBERT)
    assert TokenOrder() != HILBERT
    assert not HILBERT.is_raster


def test_blocks_are_as_compact_as_the_published_ones():
    """128 tokens of the published curve span about 6 cells on each axis of Wan's 720p grid."""
    curve = HILBERT.permutation(WAN_720P)
    blocks = curve[: len(curve) // 128 * 128].view(-1, 128)
    spans = [(x.amax(1) - x.amin(1) + 1).double().mean() for x in coordinates(blocks, WAN_720P)]
    assert spans == pytest.approx([6.0, 6.6, 5.8], abs=0.1)


def test_first_frame_lies_where_the_published_curve_puts_it():
    curve = HILBERT.permutation(WAN_720P)
    first = curve < 45 * 80
    block = torch.arange(len(curve)) // 128
    assert len(block[first].unique()) == 145
    assert first[: 28 * 128].sum() / first.sum() == pytest.approx(0.033, abs=5e-4)


def test_image_patches_are_8_by_8():
    blocks = IMAGE_PATCHES.permutation((1, 24, 32)).view(-1, 64)
    _, h, w = coordinates(blocks, (1, 24, 32))
    assert torch.equal(h.amax(1) - h.amin(1), torch.full((12,), 7))
    assert torch.equal(w.amax(1) - w.amin(1), torch.full((12,), 7))
