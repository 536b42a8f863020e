"""Means over prompts, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

DRAWS = 10_000


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of ``values``, the same in every run."""
    numbers = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(numbers), size=(DRAWS, len(numbers)))
    low, high = np.percentile(numbers[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def by_prompt(pairs: Iterable[tuple[int, float]]) -> list[float]:
    """Return the mean value of each prompt, from pairs of its index and one sample's value.

    Samples of one prompt are no independent draws, so intervals are taken over prompts.
    """
    groups: dict[int, list[float]] = {}
    for index, value in pairs:
        groups.setdefault(index, []).append(value)
    return [float(np.mean(groups[index])) for index in sorted(groups)]
