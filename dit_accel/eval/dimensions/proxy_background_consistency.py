"""A stand-in for background consistency with a network that pip installs."""

from __future__ import annotations

from torch import Tensor

from dit_accel.eval.dimensions.consistency import Consistency
from dit_accel.eval.pixels import HALF, centre_crop, normalise, resize_shorter


class ProxyBackgroundConsistency(Consistency):
    """Background consistency's formula with EfficientNet-Lite0, which is no VBench score."""

    name = "proxy_background_consistency"
    backbone_name = "efficientnet_lite0"

    def prepare(self, pixels: Tensor) -> Tensor:
        """Resize the shorter side to 224, cut out the middle, and normalise."""
        return normalise(centre_crop(resize_shorter(pixels, 224, "bicubic"), 224), HALF)
