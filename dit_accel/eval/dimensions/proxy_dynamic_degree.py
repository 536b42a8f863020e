"""A stand-in for dynamic degree with a classical optical flow."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.dimensions.dynamic_degree import dynamics
from dit_accel.eval.flow import lucas_kanade


class ProxyDynamicDegree(Dimension):
    """Dynamic degree's formula with the flow of Lucas and Kanade, which is no VBench score."""

    name = "proxy_dynamic_degree"
    least_frames = 2

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> float:
        """Return `dynamics`."""
        return dynamics(pixels, fps, lucas_kanade)
