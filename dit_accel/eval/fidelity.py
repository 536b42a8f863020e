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
    _check_shapes("psnr", first, second)
    error = (first.double() - second.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(first: Tensor, second: Tensor) -> float:
    """Return the mean structural similarity of frames ``[T, 3, H, W]`` in [0, 1].

    Gaussian windows of 11 x 11 pixels, averaged over the frames, as torchmetrics computes it.

    Raises:
        OptionError: if the shapes differ, or torchmetrics is not installed.
    """
    _check_shapes("ssim", first, second)
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise OptionError("ssim needs torchmetrics: pip install 'dit-accel[eval]'.") from error
    mean = structural_similarity_index_measure(first, second, data_range=1.0)
    return float(mean[0] if isinstance(mean, tuple) else mean)


def relative_l1(actual: Tensor, expected: Tensor) -> float:
    """Return ``sum |actual - expected| / sum |expected|``, of latents for instance.

    Raises:
        OptionError: if the shapes differ.
    """
    _check_shapes("relative_l1", actual, expected)
    difference = (actual.double() - expected.double()).abs().sum()
    return float(difference / expected.double().abs().sum())


def _check_shapes(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise OptionError(
            f"{name} compares equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
