"""Shares a budget out among heads: the least total error at a mean cost.

Each head has a few levels, each with a cost and an error. Minimising the sum of the errors under a
bound on the sum of the costs is, with a Lagrange multiplier on the cost, one choice per head: the
level at which the head's lower convex hull has the multiplier's slope. Walking through the steps of
all hulls, the steepest first, goes through those optima from the cheapest to the dearest. What is
left of the budget at the end is less than one step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Curve = Sequence[tuple[float, float]]
"""(cost, error) of a head's levels."""


def allocate(curves: Sequence[Curve], mean_cost: float) -> list[int]:
    """Return the index of each head's level.

    The sum of the errors is the least that is possible at the cost that comes out, which exceeds
    ``mean_cost`` only if the cheapest levels do.

    Args:
        curves: of all heads.
        mean_cost: budget, a mean over the heads.
    """
    hulls = [convex_hull(curve) for curve in curves]
    chosen = [hull[0] for hull in hulls]
    left = mean_cost * len(curves) - sum(curves[i][at][0] for i, at in enumerate(chosen))
    steps = [
        (_slope(curves[i], low, high), i, low, high)
        for i, hull in enumerate(hulls)
        for low, high in pairwise(hull)
    ]
    # On one hull slopes fall from step to step, so that its steps come in their order.
    for _, head, low, high in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = curves[head][high][0] - curves[head][low][0]
        if chosen[head] == low and cost <= left + 1e-9:
            chosen[head] = high
            left -= cost
    return chosen


def convex_hull(curve: Curve) -> list[int]:
    """Return the levels on the lower convex hull, by rising cost and falling error."""
    order = sorted(range(len(curve)), key=lambda at: (curve[at][0], curve[at][1]))
    hull: list[int] = []
    for at in order:
        if hull and curve[at][1] >= curve[hull[-1]][1]:
            continue  # dearer and no better
        while len(hull) > 1 and _slope(curve, hull[-1], at) >= _slope(curve, hull[-2], hull[-1]):
            hull.pop()
        if hull and curve[at][0] == curve[hull[-1]][0]:
            hull.pop()
        hull.append(at)
    return hull


def interpolated(curve: Curve, cost: float) -> float:
    """Return the error at a cost between levels, a power law between the two next to it."""
    below = max((point for point in curve if point[0] <= cost), default=min(curve))
    above = min((point for point in curve if point[0] >= cost), default=max(curve))
    if below[0] >= above[0]:
        return below[1]
    if min(below[1], above[1]) <= 0:
        share = (cost - below[0]) / (above[0] - below[0])
        return (1 - share) * below[1] + share * above[1]
    share = math.log(cost / below[0]) / math.log(above[0] / below[0])
    return below[1] ** (1 - share) * above[1] ** share


def _slope(curve: Curve, low: int, high: int) -> float:
    """Return how much error falls per cost."""
    cost = curve[high][0] - curve[low][0]
    saved = curve[low][1] - curve[high][1]
    return saved / cost if cost > 0 else float("inf")
