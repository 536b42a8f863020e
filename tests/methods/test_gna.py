import itertools
import math

import pytest
import torch
from mask_vectors import any_and_all, mask_vectors

from dit_accel import GNA
from dit_accel.call import TokenLayout
from dit_accel.errors import OptionError
from dit_accel.functional import attention_mask
from dit_accel.grid import RASTER, TokenOrder
from dit_accel.methods.windows import Axis
from dit_accel.plan import EMPTY, FULL


def literal_keys(query: int, axis: Axis) -> set[int]:
    """The keys that a query sees on one axis, as the paper and NATTEN's documentation put it."""
    group = list(range(query % axis.dilation, axis.size, axis.dilation))
    i, w, s, last = group.index(query), axis.window, axis.stride, len(group) - 1
    if axis.causal:
        leader = min(i // s * s + s - 1, last)
        return set(group[max(leader - (w - 1), 0) : i + 1])
    left, right = w // 2, w - 1 - w // 2
    leader = min(i // s * s + s // 2, last)
    centre = min(max(leader, left), last - right)
    return set(group[centre - left : centre + right + 1])


@pytest.mark.parametrize(("entry", "mask"), mask_vectors("gna", "G"))
def test_natten_masks(entry, mask):
    method = GNA(entry["window"], entry["stride"], entry["dilation"], entry["causal"])
    assert torch.equal(attention_mask(method, grid=tuple(entry["token_shape"])), mask)


@pytest.mark.parametrize("causal", [False, True], ids=["symmetric", "causal"])
@pytest.mark.parametrize("size", [1, 2, 7, 13])
def test_axis_is_the_literal_rule(size, causal):
    x = torch.arange(size)
    for window, dilation in itertools.product(range(1, size + 1), (1, 2, 3)):
        if window * dilation > size:
            continue
        for stride in range(1, window + 1):
            axis = Axis(size, window, stride, dilation, causal)
            mask = axis.allows(x[:, None], x[None, :])
            for query in range(size):
                assert set(mask[query].nonzero()[:, 0].tolist()) == literal_keys(query, axis)


STATE_CASES = [
    pytest.param(GNA(5), (13, 7, 9), id="ragged"),
    pytest.param(GNA((1.0, 0.5, 0.5)), (21, 5, 6), id="shares"),
    pytest.param(GNA(4, 3), (1, 13, 11), id="image"),
    pytest.param(GNA((3, 4, 5), (2, 3, 5)), (5, 6, 7), id="strides"),
    pytest.param(GNA(3, 1, 2), (7, 9, 8), id="dilated"),
    pytest.param(GNA(3, 2, (1, 2, 3)), (5, 8, 11), id="dilated-strides"),
    pytest.param(GNA(4, 2, 1, (True, False, True)), (6, 8, 7), id="causal"),
    pytest.param(GNA(20, 8), (1, 1, 100), id="line"),
    pytest.param(GNA(5, 1, 4), (1, 1, 63), id="line-dilated"),
]


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize(("method", "grid"), STATE_CASES)
def test_states_are_true(method, grid, block_size):
    """No kept pair is in an EMPTY block and no dropped one in a FULL block, in any order."""
    layout = TokenLayout(grid)
    method = GNA(
        method.window, method.stride, method.dilation, method.causal, block_size=block_size
    )
    dilation = tuple(axis.dilation for axis in method.axes(grid))
    orders = [RASTER, method.token_order(grid), TokenOrder((2, 3, 4), dilation)]
    mask = method.attention_mask(layout)
    for order in orders:
        here = order.permutation(grid)
        some, every = any_and_all(mask[here][:, here], block_size)
        states = method.tile_states(layout, order)
        assert not some[states == EMPTY].any()
        assert every[states == FULL].all()


def test_states_are_exact_where_blocks_are_boxes():
    method = GNA((4, 12, 12), (2, 4, 4), block_size=32)
    grid, order = (8, 16, 24), TokenOrder((2, 4, 4))
    here = order.permutation(grid)
    some, every = any_and_all(method.attention_mask(TokenLayout(grid))[here][:, here], 32)
    states = method.tile_states(TokenLayout(grid), order)
    assert torch.equal(states != EMPTY, some)
    assert torch.equal(states == FULL, every)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "bound"),
    [
        # Share of pairs in visited blocks. Ideal: prod(window) / prod(grid), of which
        # .160, .0896, .0896, .0977 and .201; raster order gives .60, .30, .30, .31 and .49.
        pytest.param((21, 45, 80), (21, 24, 24), (1, 8, 8), 0.177, id="wan-720p"),
        pytest.param((30, 48, 80), (18, 24, 24), (16, 8, 8), 0.0901, id="hunyuan-stride-16"),
        pytest.param((30, 48, 80), (18, 24, 24), (2, 8, 8), 0.0901, id="hunyuan-stride-2"),
        pytest.param((1, 256, 256), (1, 80, 80), (1, 16, 16), 0.0977, id="flux-4k"),
        pytest.param((21, 68, 120), (21, 31, 53), (1, 1, 1), 0.232, id="freeswim-1088p"),
    ],
)
def test_order_leaves_few_blocks(grid, window, stride, bound):
    density = GNA(window, stride).block_density(TokenLayout(grid))
    assert math.prod(window) / math.prod(grid) <= density + 1e-9
    assert density <= bound


@pytest.mark.parametrize("grid", [(1, 1, 100), (1, 13, 11), (13, 7, 9)], ids=str)
def test_window_of_whole_axes_is_dense(grid):
    method = GNA(1.0)
    assert (method.tile_states(TokenLayout(grid), RASTER) == FULL).all()
    assert method.token_order(grid) == RASTER


def test_shares_are_resolved_on_the_grid():
    t, h, w = GNA((1.0, 0.5, 0.01), (1, 16, 2)).axes((13, 9, 20))
    assert (t.window, h.window, w.window) == (13, 5, 1)
    assert (t.stride, h.stride, w.stride) == (1, 5, 1)
    assert GNA(1.0, dilation=2).axes((1, 9, 20))[1].window == 4


def test_single_values_skip_axes_of_one_token():
    t, h, w = GNA(5, 2, 2).axes((1, 13, 11))
    assert t == Axis(1, 1)
    assert h == Axis(13, 5, 2, 2)
    assert w == Axis(11, 5, 2, 2)


def test_short_tuples_mean_the_last_axes():
    assert GNA((3, 5)).axes((4, 9, 9)) == GNA((1.0, 3, 5)).axes((4, 9, 9))


def test_lists_are_as_good_as_tuples():
    assert GNA([1.0, 0.5, 0.5], [1, 2, 2]) == GNA((1.0, 0.5, 0.5), (1, 2, 2))
    hash(GNA([1.0, 0.5, 0.5]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 4, "stride": 5}, "stride 5 is larger than window 4 on axis t"),
        ({"window": (4, 4, 8), "stride": (1, 6, 1)}, "axis h"),
        ({"window": 0}, "window=0"),
        ({"window": 1.5}, "window=1.5"),
        ({"window": 0.0}, "window=0.0"),
        ({"window": True}, "window=True"),
        ({"window": "half"}, "window='half'"),
        ({"window": (4, 4, 4, 4)}, "one per axis"),
        ({"window": ()}, "one per axis"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 1.5}, "stride=1.5"),
        ({"dilation": 0}, "dilation=0"),
        ({"dilation": 1.0}, "dilation=1.0"),
        ({"causal": 1}, "causal=1"),
        ({"block_size": 100}, "power of two"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, words):
    with pytest.raises(OptionError, match=words):
        GNA(**options)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (GNA((1.0, 10, 4)), "window 10 spans 10 tokens, but axis h has 9"),
        (GNA((2, 4, 4)), "axis t has 1"),
        (GNA(4, dilation=3), "window 4 with dilation 3 spans 12 tokens, but axis h has 9"),
        (GNA(0.5, dilation=10), "axis h has 9"),
    ],
    ids=["window", "single-axis", "dilated", "dilation"],
)
def test_window_that_does_not_fit(method, words):
    with pytest.raises(OptionError, match=words):
        method.axes((1, 9, 12))


def test_stride_as_a_share_keeps_its_proportion_to_the_window():
    """Or a stride of a large grid would become blocked attention, with seams, on a small one."""
    method = GNA((1.0, 0.5, 0.5), (1, 0.25, 1 / 3))
    for side, window, strides in ((16, 8, (2, 3)), (64, 32, (8, 11)), (2, 1, (1, 1))):
        _, h, w = method.axes((4, side, side))
        assert (h.window, w.window) == (window, window)
        assert (h.stride, w.stride) == strides
    scaled = method.at_density(0.4, TokenLayout((16, 16, 16)))
    for axis, share in zip(scaled.axes((16, 16, 16))[1:], (0.25, 1 / 3), strict=True):
        assert axis.stride == round(share * axis.window) < axis.window


@pytest.mark.parametrize("grid", [(9, 16, 16), (16, 16, 16), (1, 30, 33)], ids=str)
def test_more_density_never_gives_a_smaller_window_on_small_grids(grid):
    method = GNA((1.0, 0.7, 0.6), (1, 0.25, 1 / 3), block_size=64)
    layout = TokenLayout(grid)
    asked = [0.35, 0.5, 0.6, 0.7, 0.8, 0.9]
    found = [method.at_density(density, layout) for density in asked]
    for density, option in zip(asked, found, strict=True):
        assert option.block_density(layout) <= density
    windows = [option.window for option in found]
    assert windows == sorted(windows)
    assert windows[0] < windows[-1]
