"""Background consistency: whether the scene stays the same, as CLIP sees it."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.consistency import Consistency
from dit_accel.eval.pixels import CLIP, centre_crop, normalise, resize_shorter


class BackgroundConsistency(Consistency):
    """Whether the scene stays the same (CLIP ViT-B/32)."""

    name = "background_consistency"
    backbone_name = "clip_b32"

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize the shorter side to 224, cut out the middle, and normalise."""
        return normalise(centre_crop(resize_shorter(pixels, 224, "bicubic"), 224), CLIP)
