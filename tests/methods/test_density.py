import re

import pytest
import torch

from dit_accel import GNA, Dense, Radial, SlidingWindow
from dit_accel.call import TokenLayout
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.grid import RASTER, TokenOrder
from dit_accel.plan import BlockSparsePlan, DensePlan

METHODS = [
    pytest.param(Radial(block_size=16, thin_below=8), id="radial"),
    pytest.param(Radial(block_size=16, rule="paper"), id="radial-paper"),
    pytest.param(GNA(block_size=16), id="gna"),
    pytest.param(GNA(0.5, 4, block_size=16), id="gna-strided"),
    pytest.param(SlidingWindow(block_size=16), id="sliding-window"),
]
LAYOUTS = [
    pytest.param(TokenLayout((13, 9, 11)), id="video"),
    pytest.param(TokenLayout((21, 6, 10), 37), id="video-text"),
]
IMAGE = TokenLayout((1, 29, 31), 7, text_first=True)


def plan_of(method, layout):
    return method.plan_layout(layout, method.token_order(layout.grid))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.95, 0.7, 0.6])
def test_at_most_what_was_asked_for(method, layout, density):
    plan = plan_of(method.at_density(density, layout), layout)
    assert isinstance(plan, BlockSparsePlan)
    assert density - 0.2 < plan.block_density <= density
    assert plan.density <= plan.block_density + 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [RASTER, TokenOrder((2, 2, 4))], ids=["raster", "tiles"])
def test_at_most_what_was_asked_for_in_an_order_that_others_chose(method, layout, order):
    if isinstance(method, Radial) and not order.is_raster:
        pytest.skip("it works in raster order alone")
    kept = method.at_density(0.8, layout, order).block_density(layout, order)
    assert 0.55 < kept <= 0.8


@pytest.mark.parametrize("method", [m for m in METHODS if "radial" not in m.id])
def test_images(method):
    plan = plan_of(method.at_density(0.4, IMAGE), IMAGE)
    assert 0.2 < plan.block_density <= 0.4


def test_radial_sees_a_single_frame_whole():
    with pytest.raises(DensityUnreachableError, match=r"at least 1\.0"):
        Radial().at_density(0.5, IMAGE)
    assert isinstance(plan_of(Radial(), IMAGE), DensePlan)


@pytest.mark.parametrize("layout", [*LAYOUTS, pytest.param(IMAGE, id="image")])
@pytest.mark.parametrize("method", METHODS)
def test_density_1_is_dense(method, layout):
    assert isinstance(plan_of(method.at_density(1, layout), layout), DensePlan)


@pytest.mark.parametrize("method", METHODS)
def test_unreachable_density_names_one_that_works(method):
    layout = TokenLayout((13, 9, 11), 50)
    with pytest.raises(DensityUnreachableError) as caught:
        method.at_density(0.001, layout)
    least = float(re.search(r"at least ([\d.]+\d)", str(caught.value))[1])
    assert plan_of(method.at_density(least, layout), layout).block_density <= least


@pytest.mark.parametrize("density", [0, -0.1, 1.01, 2, float("nan"), True, "0.5", None], ids=str)
@pytest.mark.parametrize("method", [*METHODS, pytest.param(Dense(), id="dense")])
def test_density_out_of_range(method, density):
    with pytest.raises(OptionError, match=r"must be in \(0, 1\]"):
        method.at_density(density, TokenLayout((4, 8, 8)))


def test_dense_has_density_1_only():
    layout = TokenLayout((4, 8, 8))
    assert Dense().at_density(1.0, layout) == Dense()
    with pytest.raises(DensityUnreachableError, match="keeps every pair"):
        Dense().at_density(0.5, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_quick_density_is_the_plans(method, layout):
    assert method.block_density(layout) == pytest.approx(plan_of(method, layout).block_density)


def test_gna_keeps_its_proportions_and_whole_axes():
    layout = TokenLayout((6, 24, 40))
    t, h, w = GNA((1.0, 0.5, 0.5), block_size=16).at_density(0.2, layout).axes(layout.grid)
    assert t.window == 6
    assert h.window / w.window == pytest.approx(24 / 40, abs=0.1)


def test_causal_stays_causal():
    method = GNA(1.0, causal=(True, False, False), block_size=16).at_density(
        1, TokenLayout((4, 4, 4))
    )
    mask = method.attention_mask(TokenLayout((4, 4, 4)))
    assert torch.equal(mask, torch.ones(4, 4).tril().bool().kron(torch.ones(16, 16).bool()))
