import itertools
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
from dit_accel.grid import HILBERT, RASTER
from dit_accel.methods.rectified import RectifiedSpaAttn
from dit_accel.plan import DensePlan

METHODS = [
    pytest.param(RectifiedSpaAttn(block_size=16), id="default"),
    pytest.param(RectifiedSpaAttn(block_size=16, gain_aware=True, neighbours=False), id="gain"),
    pytest.param(RectifiedSpaAttn(density=0.6, block_size=32, neighbours=False), id="density"),
    pytest.param(RectifiedSpaAttn(block_size=16, drop=0.9, first_frame=True), id="first-frame"),
]


def literal_shares(method, layout, query, key):
    """Shares of one head's blocks, and of the text, per query block."""
    scale = 1 / math.sqrt(query.shape[-1])
    keys = blocks_of(key, layout, method.block_size)
    rows = []
    for q in blocks_of(query, layout, method.block_size):
        video = [len(k) * (q.mean(0) @ k.mean(0) * scale).exp() for k in keys]
        text = (key[layout.video_length :] @ q.mean(0) * scale).exp().sum()
        row = torch.stack([*video, text])
        rows.append(row / row.sum())
    return torch.stack(rows)


def literal_critical(method, layout, shares):
    """Blocks by rank and cumulative share; the text is kept first of all."""
    columns = shares.shape[-1] - 1
    critical = literal_neighbours(method, layout)
    for i, row in enumerate(shares):
        kept, count = row[-1], 0
        for j in row[:-1].argsort(descending=True).tolist():
            if (
                count >= max(int((1 - method.drop) * columns + 1e-6), 1)
                and kept > method.cumulative
            ):
                break
            critical[i, j] = True
            kept, count = kept + row[j], count + 1
    return critical


def literal_neighbours(method, layout):
    """Pairs of blocks of which two tokens touch, a token touching itself."""
    grid, video = layout.grid, layout.video_length
    block = method.token_order(grid).inverse(grid) // method.block_size
    count = -(-video // method.block_size)
    near = torch.zeros(count, count, dtype=torch.bool)
    axes = [range(size) for size in grid]
    for t, h, w in itertools.product(*axes):
        for dt, dh, dw in itertools.product((-1, 0, 1), repeat=3):
            there = t + dt, h + dh, w + dw
            if all(0 <= x < size for x, size in zip(there, grid, strict=True)):
                a = (t * grid[1] + h) * grid[2] + w
                b = (there[0] * grid[1] + there[1]) * grid[2] + there[2]
                near[block[a], block[b]] = True
    return near


def literal_output(method, layout, query, key, value, critical, shares):
    """Attend row by row, for one head in the method's order."""
    video, size = layout.video_length, method.block_size
    scale = 1 / math.sqrt(query.shape[-1])
    queries, keys = blocks_of(query, layout, size), blocks_of(key, layout, size)
    values = blocks_of(value, layout, size)
    out = torch.empty_like(query)
    for n, q in enumerate(query):
        if n >= video:
            out[n] = (key @ q * scale).softmax(0) @ value
            continue
        i = n // size
        chosen = [j for j in range(len(keys)) if critical[i, j]]
        seen = torch.cat([*(keys[j] for j in chosen), key[video:]])
        brings = torch.cat([*(values[j] for j in chosen), value[video:]])
        factor, added = shares[i, -1] + sum(shares[i, j] for j in chosen), 0.0
        for j in set(range(len(keys))) - set(chosen):
            mean_q, mean_k = queries[i].mean(0), keys[j].mean(0)
            delta_q = (queries[i] - mean_q).abs().mean(0)
            delta_k = (keys[j] - mean_k).abs().mean(0)
            gain = (mean_q @ mean_k).abs()
            error = (delta_q @ mean_k).abs() + (mean_q @ delta_k).abs()
            if method.gain_aware and gain <= error:
                factor = factor + shares[i, j]
            else:
                added = added + shares[i, j] * values[j].mean(0)
        out[n] = factor * ((seen @ q * scale).softmax(0) @ brings) + added
    return out


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("gain_aware", [False, True], ids=["all", "gain-aware"])
def test_select_and_reference_are_the_literal_method(layout, gain_aware):
    # Large queries, so that some gains exceed their errors and 0.8 of the share is few blocks.
    method = RectifiedSpaAttn(block_size=16, drop=0.9, cumulative=0.8, gain_aware=gain_aware)
    q, k, v = random_inputs(layout)
    q, k = q + 1, k + torch.linspace(-1, 1, layout.num_tokens, dtype=q.dtype)[:, None, None]
    chosen = method.select(q, k, v, grid=layout.grid, text_length=layout.text_length)
    out = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    (oq, ok, ov), back = in_order(method, layout, (q, k, v))
    b, h = 1, 1
    head = oq[b, :, h], ok[b, :, h], ov[b, :, h]
    shares = literal_shares(method, layout, *head[:2])
    assert torch.equal(chosen[b, h], literal_critical(method, layout, shares))
    rows = literal_output(method, layout, *head, chosen[b, h], shares)
    torch.testing.assert_close(out[b, :, h], rows[back], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_plan_computes_the_reference(method, layout):
    q, k, v = random_inputs(layout)
    expected = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    torch.testing.assert_close(run_plan(method, layout, q, k, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("gain_aware", [False, True], ids=["all", "gain-aware"])
def test_density_1_is_dense(layout, gain_aware):
    method = RectifiedSpaAttn(block_size=16, gain_aware=gain_aware).at_density(1, layout)
    q, k, v = random_inputs(layout)
    out = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)
    assert isinstance(make_plan(method, layout, q, k, v), DensePlan)


@pytest.mark.parametrize("options", [{"drop": 0}, {"cumulative": 1.0}], ids=str)
def test_options_that_drop_nothing_are_dense(options):
    layout = LAYOUTS[1]
    method = RectifiedSpaAttn(block_size=16, **options)
    q, k, v = random_inputs(layout)
    assert isinstance(make_plan(method, layout, q, k, v), DensePlan)
    assert method.select(q, k, v, grid=layout.grid, text_length=layout.text_length).all()


def test_equal_tokens_in_a_block_are_rectified_exactly():
    """Where means are the tokens themselves, adding every dropped block restores dense."""
    layout = TokenLayout((1, 8, 12), 3)
    q, k, v = random_inputs(layout)
    for x in (q, k, v):
        x[:, :96] = x[:, :96:16].repeat_interleave(16, 1)
    method = RectifiedSpaAttn(block_size=16, order="raster", neighbours=False, drop=0.8)
    out = method.reference(q, k, v, grid=layout.grid, text_length=3)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)


def test_first_frame_is_found_through_the_order():
    layout = TokenLayout((6, 8, 8))
    method = RectifiedSpaAttn(block_size=16, first_frame=True, neighbours=False, drop=1.0)
    q, k, v = random_inputs(layout)
    chosen = method.select(q, k, v, grid=layout.grid)
    curve = HILBERT.permutation(layout.grid)
    holds = (curve.view(-1, 16) < 64).any(1)
    assert holds.sum() > 4  # more blocks than a frame has
    assert chosen[..., holds[:, None] & holds].all()


@pytest.mark.parametrize(
    ("grid", "density"), [((21, 45, 80), 17.3 / 591), ((32, 45, 80), 18.7 / 900)], ids=str
)
def test_neighbours_are_as_many_as_published(grid, density):
    found = RectifiedSpaAttn().least_share(TokenLayout(grid))
    assert found == pytest.approx(density, rel=0.005)


@pytest.mark.parametrize("density", [0.2, 0.25, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("layout", [TokenLayout((13, 9, 11)), TokenLayout((1, 29, 31), 9)], ids=str)
@pytest.mark.parametrize("neighbours", [True, False], ids=["neighbours", "alone"])
def test_achieved_density(layout, density, neighbours):
    method = RectifiedSpaAttn(block_size=16, neighbours=neighbours)
    q, k, v = random_inputs(layout)
    plan = make_plan(method.at_density(density, layout), layout, q, k, v)
    assert plan.density == pytest.approx(density, rel=0.1)


def test_unreachable_density_names_one_that_works():
    layout = TokenLayout((13, 9, 11))
    method = RectifiedSpaAttn(block_size=16)
    with pytest.raises(DensityUnreachableError, match=r"at least 0\.1645 .*neighbours=False"):
        method.at_density(0.1, layout)
    q, k, v = random_inputs(layout)
    plan = make_plan(method.at_density(0.1645, layout), layout, q, k, v)
    assert plan.density == pytest.approx(0.1645, rel=0.1)
    with pytest.raises(DensityUnreachableError, match=r"at least 0\.16"):
        make_plan(RectifiedSpaAttn(density=0.1, block_size=16), layout, q, k, v)


def test_orders():
    assert RectifiedSpaAttn().token_order((4, 8, 8)) == HILBERT
    assert RectifiedSpaAttn(order="raster").token_order((4, 8, 8)) == RASTER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"\(0, 1\]"),
        ({"drop": 1.1}, r"in \[0, 1\]"),
        ({"cumulative": -0.1}, r"in \[0, 1\]"),
        ({"block_size": 100}, r"\(16, 32, 64, 128\)"),
        ({"gain_aware": 1}, "True or False"),
        ({"neighbours": None}, "True or False"),
        ({"order": "rester"}, "Did you mean 'raster'"),
        ({"refresh_every": -1}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_options(options, message):
    with pytest.raises(OptionError, match=message):
        RectifiedSpaAttn(**options)
