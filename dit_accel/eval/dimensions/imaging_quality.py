"""Imaging quality: how free of blur, noise and over-exposure the frames are."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.pixels import resize

LONGEST_SIDE = 512


class ImagingQuality(Dimension):
    """How free of blur, noise and over-exposure the frames are (MUSIQ trained on SPAQ).

    The backbone maps one frame ``[1, 3, h, w]`` in [0, 1] to a score between 0 and 100. VBench
    lists that score of a video; this is a hundredth of it, as in VBench's value of a data set.
    """

    name = "imaging_quality"
    backbone_name = "musiq"

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return the mean over frames of a hundredth of the score."""
        height, width = pixels.shape[-2:]
        size = (height, width)
        if max(size) > LONGEST_SIDE:
            scale = LONGEST_SIDE / max(size)
            size = (int(scale * height), int(scale * width))
        scores = [
            torch.as_tensor(self.backbone(resize(frame[None], size, "bilinear") / 255)).flatten()
            for frame in pixels
        ]
        return torch.cat(scores).float().mean() / 100
