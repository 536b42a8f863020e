"""Motion smoothness: whether every other frame can be guessed from its neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.eval.backbones import Backbone
from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.pixels import crop_padding, pad_to_multiple


def smoothness(pixels: Tensor, interpolate: Backbone) -> Tensor:
    """Return one minus the error of guessed frames, as a share of 255.

    Args:
        pixels: ``[T, 3, H, W]`` of 0 to 255. Frames 0, 2, 4, ... are given, those between are
            guessed; a last one without a successor is left out.
        interpolate: maps two frames ``[1, 3, h, w]`` in [0, 1] to the one in their middle. Height
            and width are multiples of 16.
    """
    height, width = pixels.shape[-2:]
    errors = []
    for first in range(0, len(pixels) - 2, 2):
        before, after = (pad_to_multiple(pixels[i : i + 1], 16) / 255 for i in (first, first + 2))
        guess = crop_padding(interpolate(before, after).float(), height, width)
        whole = (guess * 255).clamp(0, 255).floor()  # AMT cuts fractions off
        errors.append((whole[0] - pixels[first + 1]).abs().mean())
    return 1 - torch.stack(errors).mean() / 255


class MotionSmoothness(Dimension):
    """Whether every other frame can be guessed from its neighbours (AMT-S).

    The backbone is `smoothness`'s ``interpolate``. VBench shrinks frames where its GPU has less
    than 24 GB; this doesn't.
    """

    name = "motion_smoothness"
    backbone_name = "amt"
    least_frames = 3

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return `smoothness`."""
        return smoothness(pixels, self.backbone)
