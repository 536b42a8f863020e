"""What subject and background consistency share: how alike the frames' features are."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.eval.dimensions.base import Dimension

BATCH = 16  # frames that a network sees at once


def consistency(features: Tensor) -> Tensor:
    """Return how alike the features ``[T, D]`` of frames are to the one before and to the first.

    Mean over the frames but the first of half the sum of both cosines, each at least 0.
    """
    features = F.normalize(features.float(), dim=-1)
    later = features[1:]
    to_previous = (later * features[:-1]).sum(-1).clamp(min=0)
    to_first = (later * features[0]).sum(-1).clamp(min=0)
    return ((to_previous + to_first) / 2).mean()


class Consistency(Dimension):
    """How alike the frames look to a network.

    The backbone maps prepared frames ``[N, 3, h, w]`` to features ``[N, D]``.
    """

    least_frames = 2

    @abstractmethod
    def prepare(self, pixels: Tensor) -> Tensor:
        """Return what the backbone is given for pixels ``[N, 3, H, W]``."""

    def compute(self, pixels: Tensor, fps: float, prompt: str) -> Tensor:
        """Return `consistency` of the backbone's features."""
        batches = pixels.split(BATCH)
        return consistency(torch.cat([self.backbone(self.prepare(part)) for part in batches]))

    def weight(self, frames: int) -> int:
        """Return the number of compared frames: VBench on one GPU averages over all of them."""
        return frames - 1
