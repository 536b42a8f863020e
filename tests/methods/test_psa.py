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

from dit_accel.call import AttentionCall, TokenLayout
from dit_accel.errors import DensityUnreachableError, GridMismatchError, OptionError
from dit_accel.grid import HILBERT, RASTER
from dit_accel.kernels.joint_reference import LEVELS
from dit_accel.methods.psa import PSA
from dit_accel.plan import DensePlan

SMALL = {"query_block": 16, "key_block": 16}
METHODS = [
    pytest.param(PSA(**SMALL), id="threshold"),
    pytest.param(PSA(query_block=32, key_block=16, similarity=(0.2, 0.1, 0.1)), id="similarity"),
    pytest.param(PSA(query_block=16, key_block=32, order="raster", density=0.4), id="density"),
    pytest.param(PSA(**SMALL, mode="top_k", ends=(0.1, 0.3, 0.5, 0.9)), id="top-k"),
]


def literal_levels(method, layout, query, key):
    """Rank by sampled attention and deal out levels, for one head in the method's order."""
    q_rows = [block[::8] for block in blocks_of(query, layout, method.query_block)]
    k_rows = [block[::8] for block in blocks_of(key, layout, method.key_block)]
    levels = torch.zeros(len(q_rows), len(k_rows), dtype=torch.int8)
    for i, rows in enumerate(q_rows):
        weights = (rows @ torch.cat(k_rows).T / math.sqrt(query.shape[-1])).softmax(-1)
        best = [part.max() for part in weights.split([len(k) for k in k_rows], dim=-1)]
        importance = torch.stack(best) / sum(best)
        order = importance.argsort(descending=True)
        for rank, j in enumerate(order.tolist()):
            if method.mode == "threshold":
                place = importance[order[: rank + 1]].sum()
            else:
                place = (rank + 1) / len(k_rows)
            fine = [
                level for level, end in zip(LEVELS, method.ends, strict=True) if place <= end + 1e-6
            ]
            levels[i, j] = 1 if rank == 0 else fine[0] if fine else 0
    return levels


def literal_output(method, layout, query, key, value, levels):
    """Attend token by token, for one head in the method's order."""
    out, video = torch.empty_like(query), layout.video_length
    for n in range(layout.num_tokens):
        if n >= video:
            keys, values, counts = key, value, torch.ones(len(key))
        else:
            text = key[video:], value[video:], [1] * layout.text_length
            parts = [list(x) for x in text]
            for j in range(levels.shape[-1]):
                level = int(levels[n // method.query_block, j])
                block = slice(j * method.key_block, min((j + 1) * method.key_block, video))
                if level:
                    for k, v in zip(
                        key[block].split(level), value[block].split(level), strict=True
                    ):
                        parts[0].append(k.mean(0))
                        parts[1].append(v.mean(0))
                        parts[2].append(len(k))
            keys, values = torch.stack(parts[0]), torch.stack(parts[1])
            counts = torch.tensor(parts[2])
        weights = counts * (keys @ query[n] / math.sqrt(query.shape[-1])).exp()
        out[n] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=str)
@pytest.mark.parametrize("mode", ["threshold", "top_k"])
def test_select_and_reference_are_the_literal_method(layout, mode):
    method = PSA(query_block=32, key_block=16, mode=mode, ends=(0.2, 0.4, 0.6, 0.9))
    q, k, v = random_inputs(layout)
    levels = method.select(q, k, v, grid=layout.grid, text_length=layout.text_length)
    out = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    (oq, ok, ov), back = in_order(method, layout, (q, k, v))
    b, h = 1, 1
    expected = literal_levels(method, layout, oq[b, :, h], ok[b, :, h])
    assert torch.equal(levels[b, h], expected)
    rows = literal_output(method, layout, oq[b, :, h], ok[b, :, h], ov[b, :, h], expected)
    torch.testing.assert_close(out[b, :, h], rows[back], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_plan_computes_the_reference(method, layout):
    q, k, v = random_inputs(layout)
    expected = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    torch.testing.assert_close(run_plan(method, layout, q, k, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_density_1_is_dense(layout):
    method = PSA(**SMALL).at_density(1, layout)
    q, k, v = random_inputs(layout)
    out = method.reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)
    assert isinstance(make_plan(method, layout, q, k, v), DensePlan)


@pytest.mark.parametrize("layout", [TokenLayout((1, 1, 13), 3), TokenLayout((1, 1, 1))], ids=str)
def test_a_single_block_is_dense(layout):
    q, k, v = random_inputs(layout)
    out = PSA().reference(q, k, v, grid=layout.grid, text_length=layout.text_length)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)
    assert isinstance(make_plan(PSA(), layout, q, k, v), DensePlan)


@pytest.mark.parametrize("level", [2, 4, 8])
def test_keys_constant_in_groups_are_exact(level):
    layout = TokenLayout((3, 5, 8), 5)
    method = PSA(**SMALL, order="raster")
    q, k, v = random_inputs(layout)
    k[:, :120] = k[:, :120:level].repeat_interleave(level, 1)
    selection = torch.full((1, 1, 8, 8), level)
    out = method.reference(q, k, v, grid=layout.grid, text_length=5, selection=selection)
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("density", [0.1, 0.15, 0.25, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("layout", [TokenLayout((13, 9, 11)), TokenLayout((1, 29, 31), 9)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_achieved_density(method, layout, density):
    q, k, v = random_inputs(layout)
    plan = make_plan(method.at_density(density, layout), layout, q, k, v)
    assert plan.density == pytest.approx(density, rel=0.1)


def test_unreachable_density_names_one_that_works():
    layout = TokenLayout((4, 8, 8), 20)
    with pytest.raises(DensityUnreachableError, match=r"at least 0\.20.* to 1\)"):
        PSA(**SMALL).at_density(0.1, layout)
    q, k, v = random_inputs(layout)
    plan = make_plan(PSA(**SMALL).at_density(0.2002, layout), layout, q, k, v)
    assert plan.density == pytest.approx(0.2002, rel=0.1)


def test_density_counts_a_choice_once_for_all_steps_that_it_serves():
    layout = TokenLayout((13, 9, 11))
    q, k, v = random_inputs(layout)
    method = PSA(**SMALL, refresh_every=4).at_density(0.15, layout)
    order = method.token_order(layout.grid)
    first, choice = method.plan_by(None, AttentionCall(layout), q, k, v, order)
    again, _ = method.plan_by(choice, AttentionCall(layout), q, k, v, order)
    assert first.density > again.density
    assert (first.density + 3 * again.density) / 4 == pytest.approx(0.15, rel=0.05)


def test_similarity_keeps_dissimilar_blocks_fine():
    layout = TokenLayout((1, 8, 32))
    q, k, v = random_inputs(layout)
    k[:, :128] = k[:, :1]  # all alike in the first half of the blocks
    method = PSA(**SMALL, order="raster", mode="top_k", ends=(0.0, 0.0, 0.0, 1.0))
    plain = method.select(q, k, v, grid=layout.grid)
    assert set(plain.unique().tolist()) == {1, 8}  # a row's first block is always exact
    capped = PSA(
        **SMALL, order="raster", mode="top_k", ends=(0, 0, 0, 1), similarity=(0.9, 0.9, 0.9)
    ).select(q, k, v, grid=layout.grid)
    assert torch.equal(capped[..., :8], plain[..., :8])
    assert (capped[..., 8:] == 1).all()


def test_choosing_leaves_the_random_numbers_alone():
    layout = LAYOUTS[0]
    state = torch.get_rng_state()
    q, k, v = random_inputs(layout)
    first = PSA(**SMALL).select(q, k, v, grid=layout.grid)
    assert torch.equal(first, PSA(**SMALL).select(q, k, v, grid=layout.grid))
    assert torch.equal(torch.get_rng_state(), state)


def test_orders():
    assert PSA().token_order((4, 8, 8)) == HILBERT
    assert PSA(order="raster").token_order((4, 8, 8)) == RASTER


def test_ends_as_a_mapping():
    assert PSA(ends={8: 0.8, 1: 0.4, 4: 0.6, 2: 0.5}) == PSA()
    assert hash(PSA(ends=[0.4, 0.5, 0.6, 0.8])) == hash(PSA())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ends": (0.5, 0.4, 0.6, 0.8)}, "must not fall"),
        ({"ends": (0.4, 0.5, 0.6)}, "give four"),
        ({"ends": {1: 0.4, 2: 0.5, 4: 0.6}}, r"each of the levels \(1, 2, 4, 8\)"),
        ({"ends": (0.4, 0.5, 0.6, 1.2)}, r"in \[0, 1\]"),
        ({"ends": 0.4}, "give four"),
        ({"key_block": 48}, r"\(16, 32, 64, 128\)"),
        ({"query_block": 8}, r"\(16, 32, 64, 128\)"),
        ({"query_block": True}, r"\(16, 32, 64, 128\)"),
        ({"density": 0}, r"\(0, 1\]"),
        ({"density": 1.5}, r"\(0, 1\]"),
        ({"mode": "quantile"}, "'threshold' or 'top_k'"),
        ({"order": "hilbrt"}, "Did you mean 'hilbert'"),
        ({"similarity": (0.7, 0.6)}, "three cosines"),
        ({"similarity": (0.7, 0.6, 2)}, r"in \[0, 1\]"),
        ({"similarity": (0.7, 0.6, 0.5), "density": 0.2}, "leave similarity or density out"),
        ({"refresh_every": 0}, "at least 1"),
    ],
    ids=str,
)
def test_impossible_options(options, message):
    with pytest.raises(OptionError, match=message):
        PSA(**options)


def test_inputs_that_do_not_fit():
    layout = LAYOUTS[1]
    q, k, v = random_inputs(layout)
    with pytest.raises(GridMismatchError):
        PSA().select(q, k, v, grid=layout.grid)
    with pytest.raises(OptionError, match="one shape"):
        PSA().select(q, k[:, :5], v, grid=layout.grid, text_length=7)
    with pytest.raises(OptionError, match="selection has shape"):
        PSA().reference(q, k, v, grid=layout.grid, text_length=7, selection=torch.ones(1, 1, 2, 2))
