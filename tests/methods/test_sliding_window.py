import pytest
import torch

from dit_accel import GNA, SlidingWindow
from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.functional import attention_mask


def test_keys_of_each_query():
    """All frames, and in each the (2d+1)-window whose centre is clamped away from the borders."""
    frames, height, width, half_h, half_w = 3, 9, 11, 2, 3
    mask = attention_mask(SlidingWindow((5, 7)), grid=(frames, height, width))
    mask = mask.view(frames, height, width, frames, height, width)
    for h in range(height):
        for w in range(width):
            expected = torch.zeros(height, width, dtype=torch.bool)
            row = min(max(h, half_h), height - 1 - half_h)
            column = min(max(w, half_w), width - 1 - half_w)
            rows = slice(row - half_h, row + half_h + 1)
            expected[rows, column - half_w : column + half_w + 1] = True
            assert (mask[:, h, w] == expected).all()


def test_even_windows_start_at_half():
    mask = attention_mask(SlidingWindow((4, 1.0)), grid=(1, 10, 1))
    starts = mask.int().argmax(1)
    assert starts.tolist() == [min(max(h - 2, 0), 6) for h in range(10)]
    assert (mask.sum(1) == 4).all()


@pytest.mark.parametrize("grid", [(5, 8, 9), (1, 13, 11)], ids=str)
def test_is_gna_with_stride_1_and_whole_time(grid):
    ours, gna = SlidingWindow((4, 0.5), block_size=16), GNA((1.0, 4, 0.5), block_size=16)
    assert torch.equal(attention_mask(ours, grid=grid), attention_mask(gna, grid=grid))
    assert ours.token_order(grid) == gna.token_order(grid)
    order, layout = ours.token_order(grid), TokenLayout(grid)
    assert torch.equal(ours.tile_states(layout, order), gna.tile_states(layout, order))


def test_density_leaves_time_alone():
    layout = TokenLayout((8, 12, 16))
    method = SlidingWindow(1.0, block_size=16).at_density(0.3, layout)
    t, h, w = method.as_gna().axes(layout.grid)
    assert t.window == 8
    assert h.window < 12
    assert w.window < 16


@pytest.mark.parametrize("window", [0, 1.5, (1, 2, 3), (4,), "all"], ids=str)
def test_bad_windows(window):
    with pytest.raises(OptionError, match="window"):
        SlidingWindow(window)


def test_window_larger_than_the_axis():
    with pytest.raises(OptionError, match="axis h has 30"):
        attention_mask(SlidingWindow((31, 5)), grid=(1, 30, 8))
