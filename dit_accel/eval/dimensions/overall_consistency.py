"""Overall consistency: whether the video shows what its prompt says."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import VideoError
from dit_accel.eval.dimensions.base import Dimension
from dit_accel.eval.pixels import CLIP, centre_crop, middle_indices, normalise, resize_shorter

FRAMES = 8


class OverallConsistency(Dimension):
    """Whether the video shows what its prompt says (ViCLIP).

    The backbone maps a clip ``[8, 3, 224, 224]``, normalised for CLIP, and a prompt to the features
    ``[D]`` of each.
    """

    name = "overall_consistency"
    backbone_name = "viclip"

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return the cosine of both features.

        Raises:
            VideoError: if there is no prompt.
        """
        if not prompt.strip():
            raise VideoError(f"{self.name} needs the prompt of the video.")
        picked = pixels[middle_indices(len(pixels), FRAMES)]
        resized = resize_shorter(picked, 224, "bicubic", whole=True)
        video, text = self.backbone(normalise(centre_crop(resized, 224), CLIP), prompt)
        return F.cosine_similarity(video.float().flatten(), text.float().flatten(), dim=0)
