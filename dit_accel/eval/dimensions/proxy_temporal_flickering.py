"""Temporal flickering of every video, whether it stands still or not."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.dimensions.temporal_flickering import steadiness


class ProxyTemporalFlickering(Dimension):
    """Temporal flickering's formula without its static filter, so motion counts as flicker."""

    name = "proxy_temporal_flickering"
    least_frames = 2

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return `steadiness`."""
        return steadiness(pixels)
