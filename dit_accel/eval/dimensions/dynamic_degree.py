"""Dynamic degree: whether anything in the video moves fast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from dit_accel.eval.backbones import Backbone
from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.flow import fastest


def is_dynamic(speeds: Sequence[float], frames: int, shorter_side: int) -> bool:
    """Whether enough neighbouring frames differ by fast motion.

    Args:
        speeds: of neighbouring frames, in pixels.
        frames: how many frames were compared. Two need no fast pair at all, as in VBench.
        shorter_side: of the frames, in pixels.
    """
    threshold, needed = 6 * shorter_side / 256, round(4 * frames / 16)
    return bool(speeds) and sum(speed > threshold for speed in speeds) >= needed


def dynamics(pixels: Tensor, fps: float, flow: Backbone) -> float:
    """Return 1 if a video is dynamic at about 8 frames per second, else 0."""
    frames = pixels[:: max(1, round(fps / 8))]
    speeds = [fastest(flow, a, b, share=0.05) for a, b in pairwise(frames)]
    return float(is_dynamic(speeds, len(frames), min(pixels.shape[-2:])))


class DynamicDegree(Dimension):
    """Whether anything in the video moves fast: 1 or 0 (RAFT).

    The backbone maps two frames ``[1, 3, h, w]`` of 0 to 255 to the flow ``[1, 2, h, w]`` from the
    first to the second, in pixels. Height and width are multiples of 8.
    """

    name = "dynamic_degree"
    backbone_name = "raft"
    least_frames = 2

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> float:
        """Return `dynamics`."""
        return dynamics(pixels, fps, self.backbone)
