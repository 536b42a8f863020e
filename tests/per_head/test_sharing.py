"""What is made of error curves that are known, without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dit_accel.call import TokenLayout
from dit_accel.methods.gna import GNA
from dit_accel.methods.psa import PSA
from dit_accel.per_head.curves import HeadCurves, _reached
from dit_accel.per_head.method import at_level
from dit_accel.per_head.sharing import WORTH, at_one_density, per_head_method, shared_out

LAYOUT = TokenLayout((5, 12, 12))
METHODS = {
    "gna": GNA(block_size=16),
    "gna + remainder": GNA(block_size=16, remainder="pooled"),
    "psa": PSA(query_block=16, key_block=16),
}


def curves_with(method, scale_of_layers, heads=2, layout=LAYOUT):
    """Errors that fall as 1 / cost - 1, times a layer's scale."""
    levels = tuple(_reached(method, layout))
    cost = tuple(
        at_level(method, level, layout).block_density(layout) if isinstance(method, GNA) else level
        for level in levels
    )
    error = tuple((tuple(scale * (1 / c - 1) for c in cost),) * heads for scale in scale_of_layers)
    text_lengths = (layout.text_length,) * len(error)
    return HeadCurves(layout, text_lengths, levels, (cost,) * len(error), error)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("density", [0.15, 0.25])
def test_alike_heads_do_what_the_method_does_at_the_density(name, density):
    method = METHODS[name]
    curves = curves_with(method, [1.0] * 4)
    # What a budget is made of: the density that the method really has when asked for this one.
    uniform = method.at_density(density, LAYOUT)
    budget = uniform.block_density(LAYOUT) + 1e-6 if isinstance(method, GNA) else density
    shared = per_head_method(method, curves, budget)
    (level,) = {density for row in shared.densities for density in row}
    assert at_level(method, level, LAYOUT) == uniform
    assert shared.token_order(LAYOUT.grid) == uniform.token_order(LAYOUT.grid)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_that_loses_tenfold_gets_the_budget_of_the_others(name):
    method = METHODS[name]
    shared = per_head_method(method, curves_with(method, [1.0, 10.0, 1.0]), 0.3)
    first, poor, last = (min(row) for row in shared.densities)
    assert poor > 1.5 * max(first, last)


@pytest.mark.parametrize("name", ["gna", "gna + remainder"])
def test_the_budget_holds_in_the_order_that_the_heads_share(name):
    method = METHODS[name]
    for scales in ([1.0, 10.0], [1.0, 2.0, 4.0], [1.0, 100.0, 1.0]):
        for density in (0.2, 0.35, 0.5):
            shared = per_head_method(method, curves_with(method, scales), density)
            order = shared.token_order(LAYOUT.grid)
            costs = [
                at_level(method, level, LAYOUT).block_density(LAYOUT, order)
                for row in shared.densities
                for level in row
            ]
            assert sum(costs) / len(costs) <= density + 1e-5


@pytest.mark.parametrize("name", ["gna", "gna + remainder"])
@pytest.mark.parametrize("sharing", [shared_out, at_one_density])
def test_the_budget_holds_with_other_text_and_in_layers_without_any(name, sharing):
    method, layout = METHODS[name], replace(LAYOUT, text_length=90)
    curves = curves_with(method, [1.0, 30.0, 3.0], layout=layout)
    curves = replace(curves, text_lengths=(90, 0, 90))
    _, shared = sharing(method, curves, 0.5)
    order = shared.token_order(layout.grid)

    def mean_cost(text_lengths):
        of_layers = [replace(layout, text_length=length) for length in text_lengths]
        costs = [
            at_level(method, density, of, order).block_density(of, order)
            for of, row in zip(of_layers, shared.densities, strict=True)
            for density in row
        ]
        return sum(costs) / len(costs)

    for text_lengths in ((90, 0, 90), (60, 0, 60), (37, 0, 37)):
        assert 0.35 < mean_cost(text_lengths) <= 0.5 + 1e-5


def test_every_pattern_of_a_static_method_is_a_level():
    levels = _reached(METHODS["gna"], LAYOUT)
    patterns = [at_level(METHODS["gna"], level, LAYOUT) for level in levels]
    assert len(set(patterns)) == len(patterns)
    for density in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        assert METHODS["gna"].at_density(density, LAYOUT) in patterns


def test_another_order_changes_what_heads_cost():
    small = at_level(METHODS["gna"], 0.12, LAYOUT)
    usual = METHODS["gna"].token_order(LAYOUT.grid)
    assert small.block_density(LAYOUT, usual) > 1.1 * small.block_density(LAYOUT)
    assert replace(small, window=1.0).block_density(LAYOUT, usual) == 1


@pytest.mark.parametrize("name", METHODS)
def test_heads_that_differ_little_keep_one_density(name):
    method = METHODS[name]
    curves = curves_with(method, [1.0, 1.2, 1.0])
    assert (
        len({density for row in per_head_method(method, curves, 0.3).densities for density in row})
        == 1
    )
    even, _ = at_one_density(method, curves, 0.3)
    shared, _ = shared_out(method, curves, 0.3)
    assert WORTH * even < shared
