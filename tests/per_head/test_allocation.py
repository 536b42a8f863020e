"""Sharing a budget out, against all possible ways."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dit_accel.per_head.allocation import allocate, convex_hull, interpolated


def total(curves, chosen, what):
    return sum(curve[at][what] for curve, at in zip(curves, chosen, strict=True))


def random_curves(seed, heads=5, levels=4):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(heads, levels, generator=generator).cumsum(-1)
    error = torch.rand(heads, levels, generator=generator).flip(-1).cumsum(-1).flip(-1)
    return [
        list(zip(c.tolist(), e.tolist(), strict=True)) for c, e in zip(cost, error, strict=True)
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_no_other_way_has_less_error_at_the_cost_spent(seed, share):
    curves = random_curves(seed)
    least, most = (sum(curve[at][0] for curve in curves) for at in (0, -1))
    budget = (least + share * (most - least)) / len(curves)
    chosen = allocate(curves, budget)
    spent = total(curves, chosen, 0)
    assert spent <= budget * len(curves) + 1e-9
    every = list(product(range(4), repeat=len(curves)))
    within = [total(curves, way, 1) for way in every if total(curves, way, 0) <= spent + 1e-9]
    best_within = min(within)
    found = total(curves, chosen, 1)
    # Between two points of the multiplier the last steps are greedy: near, but not always least.
    assert found <= best_within * 1.15 + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_at_the_multipliers_own_costs_it_is_the_least(seed):
    curves = random_curves(seed)
    every = list(product(range(4), repeat=len(curves)))
    for price in (0.05, 0.3, 1.0, 4.0):
        way = min(every, key=lambda way: total(curves, way, 1) + price * total(curves, way, 0))
        spent = total(curves, way, 0)
        chosen = allocate(curves, spent / len(curves))
        assert total(curves, chosen, 1) == pytest.approx(total(curves, way, 1))


def test_the_hull_leaves_out_what_never_pays():
    curve = [(0.1, 1.0), (0.2, 0.9), (0.3, 0.2), (0.5, 0.3), (1.0, 0.0)]
    assert convex_hull(curve) == [0, 2, 4]


def test_the_cheapest_levels_are_taken_where_the_budget_is_too_small():
    assert allocate([[(0.5, 1.0), (1.0, 0.0)]] * 3, 0.2) == [0, 0, 0]


def test_alike_heads_share_alike_and_a_poor_one_gets_more():
    alike = [[(0.1, 1.0), (0.3, 0.5), (1.0, 0.0)]] * 3
    poor = [(0.1, 9.0), (0.3, 6.0), (1.0, 0.0)]
    assert allocate(alike, 0.3) == [1, 1, 1]
    chosen = allocate([*alike, poor], 0.5)
    assert chosen[3] > max(chosen[:3])


def test_between_levels_errors_follow_a_power_law():
    curve = [(0.1, 8.0), (0.4, 2.0), (0.8, 1.0), (1.0, 0.0)]
    assert interpolated(curve, 0.2) == pytest.approx(4.0)
    assert interpolated(curve, 0.4) == 2.0
    assert interpolated(curve, 0.9) == pytest.approx(0.5)
    assert interpolated(curve, 0.05) == 8.0
