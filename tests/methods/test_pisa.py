import math

import pytest
import torch
from selecting_checks import (
    LAYOUTS,
    blocks_of,
    dense,
    in_order,
    make_plan,
    random_inputs,
    run_plan,
)

from dit_accel.call import TokenLayout
from dit_accel.errors import DensityUnreachableError, OptionError
from dit_accel.grid import HILBERT, IMAGE_PATCHES, RASTER
from dit_accel.methods.pisa import PISA
from dit_accel.plan import DensePlan

METHODS = [
    pytest.param(PISA(0.3, block_size=16), id="first-order"),
    pytest.param(PISA(0.3, block_size=32, terms=0), id="zeroth-order"),
    pytest.param(PISA(0.7, block_size=16, order="hilbert"), id="dense-enough"),
    pytest.param(PISA(0.2, block_size=16, covariance_weighted=True), id="covariance"),
]


def literal_scores(method, layout, query, key, value, weighted):
    queries = blocks_of(query, layout, method.block_size)
    keys = blocks_of(key, layout, method.block_size)
    values = blocks_of(value, layout, method.block_size)
    scores = torch.empty(len(queries), len(keys), dtype=query.dtype)
    for i, q in enumerate(queries):
        for j, (k, v) in enumerate(zip(keys, values, strict=True)):
            scores[i, j] = q.mean(0) @ k.mean(0) / math.sqrt(query.shape[-1])
            if weighted:
                moment = (k - k.mean(0)).T @ v
                scores[i, j] += math.log(moment.square().sum().sqrt() + 1e-5)
    return scores


def literal_output(method, layout, query, key, value, chosen, first_order):
    """Attend token by token, for one head in the method's order."""
    video, scale = layout.video_length, 1 / math.sqrt(query.shape[-1])
    keys = blocks_of(key, layout, method.block_size)
    values = blocks_of(value, layout, method.block_size)
    moment = sum((k - k.mean(0)).T @ v for k, v in zip(keys, values, strict=True))
    out = torch.empty_like(query)
    for n, q in enumerate(query):
        weight = (key[video:] @ q * scale).exp()
        total, numerator, left = weight.sum(), weight @ value[video:], 0.0
        for j, (k, v) in enumerate(zip(keys, values, strict=True)):
            if n >= video or chosen[n // method.block_size, j]:
                weight = (k @ q * scale).exp()
                total, numerator = total + weight.sum(), numerator + weight @ v
            else:
                weight = (k.mean(0) @ q * scale).exp()
                left += len(k) * weight
                total, numerator = total + len(k) * weight, numerator + weight * v.sum(0)
        if first_order:
            numerator = numerator + left / video * scale * (q @ moment)
        out[n] = numerator / total
    return out


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("terms", [0, 1])
def test_select_and_reference_are_the_literal_method(layout, terms):
    method = PISA(0.3, block_size=32, terms=terms)
    q, k, v = random_inputs(layout)
    chosen = method.select(q, k, v, grid=layout.grid, text_length=layout.text_length)
    out = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    (oq, ok, ov), back = in_order(method, layout, (q, k, v))
    b, h = 1, 1
    head = oq[b, :, h], ok[b, :, h], ov[b, :, h]
    scores = literal_scores(method, layout, *head, weighted=layout.grid[0] == 1)
    counts = chosen[b, h].sum(-1)
    assert set(counts.tolist()) <= {math.floor(0.3 * len(scores)), math.ceil(0.3 * len(scores))}
    for i, count in enumerate(counts.tolist()):
        best = scores[i].argsort(descending=True)[:count]
        assert chosen[b, h, i].nonzero().flatten().tolist() == sorted(best.tolist())
    rows = literal_output(method, layout, *head, chosen[b, h], terms == 1)
    torch.testing.assert_close(out[b, :, h], rows[back], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_plan_computes_the_reference(method, layout):
    q, k, v = random_inputs(layout)
    expected = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    torch.testing.assert_close(run_plan(method, layout, q, k, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_density_1_is_dense(layout):
    method = PISA(block_size=16).at_density(1, layout)
    q, k, v = random_inputs(layout)
    out = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)
    assert isinstance(make_plan(method, layout, q, k, v), DensePlan)


def test_a_single_block_is_dense():
    layout = TokenLayout((1, 5, 5), 3)
    q, k, v = random_inputs(layout)
    assert isinstance(make_plan(PISA(), layout, q, k, v), DensePlan)


@pytest.mark.parametrize("terms", [0, 1])
def test_keys_constant_in_blocks_are_exact(terms):
    layout = TokenLayout((2, 6, 9), 5)
    q, k, v = random_inputs(layout)
    k[:, :108] = k[:, :108:16].repeat_interleave(16, 1)[:, :108]
    method = PISA(0.15, block_size=16, terms=terms, order="raster")
    out = method.reference(q, k, v, grid=layout.grid, text_length=5)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)


def test_first_order_helps_on_smooth_tokens():
    layout = TokenLayout((4, 16, 16))
    generator = torch.Generator().manual_seed(0)
    at = torch.linspace(0, 3, 1024, dtype=torch.float64)[:, None]
    waves = torch.rand(3, 8, generator=generator, dtype=torch.float64) * 4
    q, k, v = ((at * wave + wave).sin()[None, :, None] * 2 for wave in waves)
    error = [
        (PISA(0.15, terms=terms).reference(q, k, v, grid=layout.grid) - dense(q, k, v)).norm()
        for terms in (0, 1)
    ]
    assert error[1] < error[0]


def test_first_order_is_left_out_above_half():
    layout = LAYOUTS[0]
    q, k, v = random_inputs(layout)
    for density, first_order in ((0.45, True), (0.55, False)):
        plan = make_plan(PISA(density, block_size=16), layout, q, k, v)
        assert plan.first_order == first_order
        assert (plan.statistics.moment is not None) == first_order


@pytest.mark.parametrize("density", [0.1, 0.15, 0.25, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("layout", [TokenLayout((13, 9, 11)), TokenLayout((1, 29, 31), 9)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_achieved_density(method, layout, density):
    q, k, v = random_inputs(layout)
    plan = make_plan(method.at_density(density, layout), layout, q, k, v)
    assert plan.density == pytest.approx(density, rel=0.1)


def test_unreachable_density_names_one_that_works():
    layout = TokenLayout((4, 8, 8))
    with pytest.raises(DensityUnreachableError, match=r"at least 0\.1231 .* smaller blocks"):
        PISA(block_size=16).at_density(0.05, layout)
    q, k, v = random_inputs(layout)
    plan = make_plan(PISA(block_size=16).at_density(0.1231, layout), layout, q, k, v)
    assert plan.density <= 0.1231


def test_orders():
    assert PISA().token_order((1, 64, 64)) == HILBERT
    assert PISA(order="patches").token_order((1, 64, 64)) == IMAGE_PATCHES
    assert PISA(order="raster").token_order((1, 64, 64)) == RASTER
    assert PISA(order="hilbert").token_order((21, 8, 8)) == HILBERT


def test_the_first_order_is_for_videos_unless_asked_for():
    assert "moment" in PISA().wanted(LAYOUTS[0])
    assert "moment" not in PISA().wanted(LAYOUTS[1])
    assert "moment" in PISA(terms=1).wanted(LAYOUTS[1])
    assert "moment" not in PISA(terms=0).wanted(LAYOUTS[0])


def test_covariance_is_for_images_unless_asked_for():
    layout = LAYOUTS[0]
    assert PISA().wanted(layout) == {"moment"}
    assert PISA(terms=1).wanted(LAYOUTS[1]) == {"moment", "moment_norm"}
    assert PISA(covariance_weighted=True, terms=0).wanted(layout) == {"moment_norm"}
    assert PISA(covariance_weighted=False, terms=0).wanted(LAYOUTS[1]) == frozenset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"\(0, 1\]"),
        ({"density": None}, r"\(0, 1\]"),
        ({"block_size": 65}, r"\(16, 32, 64, 128\)"),
        ({"terms": 2}, "0 or 1"),
        ({"terms": True}, "0 or 1"),
        ({"covariance_weighted": "yes"}, "None, True or False"),
        ({"order": "random"}, "unknown"),
        ({"refresh_every": 1.5}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_options(options, message):
    with pytest.raises(OptionError, match=message):
        PISA(**options)
