"""Aesthetic quality: how beautiful people would find the frames."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.pixels import CLIP, centre_crop, normalise, resize_shorter

BATCH = 16  # frames that the network sees at once


class AestheticQuality(Dimension):
    """How beautiful people would find the frames (CLIP ViT-L/14 and LAION's linear head).

    The backbone maps frames ``[N, 3, 224, 224]``, normalised for CLIP, to scores ``[N]`` between
    0 and 10.
    """

    name = "aesthetic_quality"
    backbone_name = "laion_aesthetic"

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return the mean over frames of a tenth of the score."""
        scores = [
            self.backbone(normalise(centre_crop(resize_shorter(part, 224, "bicubic"), 224), CLIP))
            for part in pixels.split(BATCH)
        ]
        return torch.cat(scores).float().mean() / 10
