"""Subject consistency: whether the subject stays the same, as DINO sees it."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.consistency import Consistency
from dit_accel.eval.pixels import IMAGENET, normalise, resize_shorter


class SubjectConsistency(Consistency):
    """Whether the subject stays the same (DINO ViT-B/16)."""

    name = "subject_consistency"
    backbone_name = "dino"

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize the shorter side to 224, without a crop, and normalise."""
        return normalise(resize_shorter(pixels, 224, "bilinear"), IMAGENET)
