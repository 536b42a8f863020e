"""A stand-in for motion smoothness that guesses frames without a network."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.dimensions.motion_smoothness import smoothness


class ProxyMotionSmoothness(Dimension):
    """Motion smoothness's formula with the mean of both neighbours, so fast motion costs too."""

    name = "proxy_motion_smoothness"
    least_frames = 3

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return `smoothness`."""
        return smoothness(pixels, lambda before, after: (before + after) / 2)
