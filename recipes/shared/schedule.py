"""The learning-rate schedule of every recipe."""

import math


def schedule(share: float, hold: float) -> float:
    """Learning-rate factor after `share` of the time: constant up to `hold`, then a cosine to 0."""
    if share < hold:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (share - hold) / (1 - hold)))) * 0.99 + 0.01
