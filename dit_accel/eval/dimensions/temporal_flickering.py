"""Temporal flickering: how little pixels change from frame to frame, in videos that should not."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension


class TemporalFlickering(Dimension):
    """How little pixels change from frame to frame (VBench)."""

    name = "temporal_flickering"
    least_frames = 2

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return one minus the mean absolute difference of neighbours."""
        return 1 - pixels.diff(dim=0).abs().mean() / 255
