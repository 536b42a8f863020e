"""A stand-in for subject consistency with a network that pip installs."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.consistency import Consistency
from dit_accel.eval.pixels import HALF, normalise, resize_shorter


class ProxySubjectConsistency(Consistency):
    """Subject consistency's formula with EfficientNet-Lite0, which is no VBench score."""

    name = "proxy_subject_consistency"
    backbone_name = "efficientnet_lite0"

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize the shorter side to 224, without a crop, and normalise."""
        return normalise(resize_shorter(pixels, 224, "bilinear"), HALF)
