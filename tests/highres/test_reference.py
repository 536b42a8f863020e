"""FreeSwim's formulas, and the window method against them."""

from __future__ import annotations

import pytest
import torch

from dit_accel import SlidingWindow, sparse_attention
from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.functional import attention_mask
from dit_accel.grid import RASTER
from dit_accel.highres.freeswim import FreeSwim
from dit_accel.highres.reference import inward_window, length_gain, window_start, window_tokens
from dit_accel.kernels.reference import masked_attention


@pytest.mark.parametrize(
    ("pixels", "odd", "native"),
    [((480, 832), (31, 53), (30, 52)), ((720, 1280), (45, 81), (45, 80))],
    ids=str,
)
def test_windows_of_the_published_sizes(pixels, odd, native):
    trained = (pixels[0] // 16, pixels[1] // 16)
    grid = (21, 68, 120)
    assert FreeSwim().sliding_window(grid, trained).window == odd
    assert FreeSwim(window="native").sliding_window(grid, trained).window == native


def test_published_gain():
    assert length_gain(30 * 52) == pytest.approx(1.0461, abs=5e-5)
    assert FreeSwim().sliding_window((21, 68, 120), (30, 52)).gain == length_gain(30 * 52)
    assert FreeSwim(gain=1.0).sliding_window((21, 68, 120), (30, 52)).gain == 1


@pytest.mark.parametrize("size", [9, 10])
@pytest.mark.parametrize("window", [3, 4, 8, 9])
def test_every_query_has_a_whole_window_around_it(size, window):
    start = window_start(size, window)
    assert start.tolist() == [min(max(h - window // 2, 0), size - window) for h in range(size)]
    if window % 2:
        # The released form: the window's centre is kept away from the borders.
        half = window // 2
        centre = torch.arange(size).clamp(half, size - 1 - half)
        assert torch.equal(start, centre - half)


@pytest.mark.parametrize("window", [(3, 5), (4, 6), (3, 6), (4, 5), (7, 8)], ids=str)
@pytest.mark.parametrize("grid", [(2, 7, 9), (1, 8, 10), (3, 7, 10)], ids=str)
def test_the_window_method_is_the_closed_form_at_every_position(grid, window):
    mask = inward_window(grid, window)
    assert torch.equal(attention_mask(SlidingWindow(window), grid=grid), mask)
    method, layout = SlidingWindow(window, block_size=16), TokenLayout(grid)
    order = method.token_order(grid)
    query, key, value = (torch.randn(1, len(mask), 2, 8, dtype=torch.float64) for _ in range(3))
    out = sparse_attention(query, key, value, method, grid=grid)
    torch.testing.assert_close(out, masked_attention(query, key, value, mask)[0])
    assert method.plan_block_sparse(layout, order).tiles.allowed_pairs() == int(mask.sum())


def test_tiles_visit_little_more_than_the_window():
    """At the published size; tokens in raster order would visit 2.4 times as much."""
    method, layout = FreeSwim().sliding_window((21, 68, 120), (30, 52)), TokenLayout((21, 68, 120))
    ideal = 31 * 53 / (68 * 120)
    assert ideal < method.block_density(layout) < 1.2 * ideal
    assert method.block_density(layout, RASTER) > 0.45


def test_windows_never_outgrow_the_grid():
    assert FreeSwim().sliding_window((5, 30, 60), (30, 52)).window == (30, 53)
    assert FreeSwim(window=(99, 7)).sliding_window((5, 30, 60), (30, 52)).window == (30, 7)


def test_released_windows_are_odd():
    assert [window_tokens(n, "released") for n in (1, 2, 30, 45)] == [1, 3, 31, 45]


def test_gain_multiplies_the_logits():
    grid = (2, 6, 8)
    query, key, value = (torch.randn(1, 96, 2, 8, dtype=torch.float64) for _ in range(3))
    mask = inward_window(grid, (3, 4))
    for scale in (None, 0.3):
        plain = 8**-0.5 if scale is None else scale
        expected, _ = masked_attention(query, key, value, mask, 1.5 * plain)
        method = SlidingWindow((3, 4), gain=1.5, block_size=16)
        out = sparse_attention(query, key, value, method, grid=grid, scale=scale)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("gain", [0, -1.0, float("nan"), float("inf"), True, "1"], ids=str)
def test_impossible_gains(gain):
    with pytest.raises(OptionError, match="gain"):
        SlidingWindow(gain=gain)
