"""Temporal flickering: how little pixels change from frame to frame, in videos that stand still."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.flow import fastest


def steadiness(pixels: Tensor) -> Tensor:
    """Return one minus the mean absolute difference of neighbours, as a share of 255."""
    differences = [(after - before).abs().mean() for before, after in pairwise(pixels)]
    return 1 - torch.stack(differences).mean() / 255


def stands_still(speeds: Sequence[float], frames: int, shorter_side: int) -> bool:
    """Whether VBench's static filter keeps a video.

    Args:
        speeds: of neighbouring frames, and of the first to the last and back, in pixels.
        frames: how many the video has.
        shorter_side: of the frames, in pixels.
    """
    threshold, allowed = 3 * shorter_side / 256, round(2 * frames / 16)
    *neighbours, there, back = speeds
    if sum(speed > threshold for speed in neighbours) > allowed:
        return False
    return max(there, back) <= 2 * threshold * allowed


class TemporalFlickering(Dimension):
    """How little pixels change from frame to frame, counted in videos that stand still.

    A still picture has the best value, so look at dynamic degree beside it. The backbone (RAFT)
    is for `counts` alone: it maps two frames ``[1, 3, h, w]`` of 0 to 255 to the flow
    ``[1, 2, h, w]`` from the first to the second, in pixels.
    """

    name = "temporal_flickering"
    backbone_name = "raft"
    least_frames = 2

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return `steadiness`."""
        return steadiness(pixels)

    def counts(self, frames: Tensor, fps: float = 8.0) -> bool:
        """Whether the video stands still, by the flow of its fastest 2 % of pixels."""
        pixels = self._prepared(frames, fps)
        ends = [(pixels[0], pixels[-1]), (pixels[-1], pixels[0])]
        with torch.inference_mode():
            pairs = [*pairwise(pixels), *ends]
            speeds = [fastest(self.backbone, a, b, share=0.02) for a, b in pairs]
        return stands_still(speeds, len(pixels), min(pixels.shape[-2:]))
