"""How close an accelerated generation is to the dense one: measures that need no weights."""

from __future__ import annotations

import math

from torch import Tensor

from dit_accel.errors import OptionError


def psnr(first: Tensor, second: Tensor) -> float:
    """Return the peak signal-to-noise ratio of two float tensors in [0, 1], in dB.

    One mean squared error over all elements, frames included; ``math.inf`` if they are equal.

    Raises:
        OptionError: if the shapes differ.
    """
    if first.shape != second.shape:
        raise OptionError(
            f"psnr compares equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    error = (first.double() - second.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)
