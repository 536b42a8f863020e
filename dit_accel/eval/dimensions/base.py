"""What every dimension has: a formula over 8-bit pixels, and the network that it sees them with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.errors import OptionError, VideoError
from dit_accel.eval.backbones import Backbone, load_backbone
from dit_accel.eval.pixels import to_pixels


class Dimension(ABC):
    """One aspect of a video, as a number between 0 and 1 where more is better.

    Args:
        backbone: the network, see the dimension for what it is given and returns; None loads
            `backbone_name` when it is first needed.
        device: where it runs, wherever the frames are.
    """

    name: ClassVar[str]
    """Registered name: VBench's own, or ``proxy_...`` for what is like it but not it."""
    backbone_name: ClassVar[str | None] = None
    """The network of `backbones.BACKBONES` that gives VBench's number; None needs none."""
    least_frames: ClassVar[int] = 1
    """Frames that the formula needs."""

    def __init__(
        self, backbone: Backbone | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self._given = backbone

    @cached_property
    def backbone(self) -> Backbone:
        """The network, loaded when it is first asked for.

        Raises:
            BackboneError: if it can't be loaded; the message says how to get it.
        """
        if self._given is not None:
            return self._given
        if self.backbone_name is None:
            raise OptionError(f"{self.name} has no backbone.")
        return load_backbone(self.backbone_name, self.device)

    def measure(self, frames: Tensor, fps: float = 8.0, prompt: str = "") -> float:
        """Return the value of one video.

        Args:
            frames: float ``[T, 3, H, W]`` in [0, 1], RGB. They are rounded to 8 bits first, as a
                video file holds them.
            fps: frames per second.
            prompt: what the video was to show.

        Raises:
            OptionError: if these are no frames, or ``fps`` is not positive.
            VideoError: if there are too few frames, or the network gives no number.
            BackboneError: if the network can't be loaded.
        """
        pixels = self._prepared(frames, fps)
        with torch.inference_mode():
            value = float(self.compute(pixels, fps, prompt))
        if not math.isfinite(value):
            raise VideoError(f"{self.name} of this video is {value}.")
        return value

    def counts(self, frames: Tensor, fps: float = 8.0) -> bool:
        """Whether VBench's value of a data set takes this video into account."""
        return True

    def weight(self, frames: int) -> int:
        """Return how much a video of so many frames counts in VBench's value of a data set."""
        return 1

    @abstractmethod
    def compute(self, pixels: Tensor, fps: float, prompt: str) -> float | Tensor:
        """Return the value of pixels ``[T, 3, H, W]``, whole numbers between 0 and 255."""

    def _prepared(self, frames: Tensor, fps: float) -> Tensor:
        if frames.dim() != 4 or frames.shape[1] != 3 or not frames.is_floating_point():
            raise OptionError(
                f"{self.name} measures float frames [T, 3, H, W] in [0, 1], got "
                f"{frames.dtype} {tuple(frames.shape)}."
            )
        if not (math.isfinite(fps) and fps > 0):
            raise OptionError(f"{self.name}: fps={fps} must be a positive number.")
        if len(frames) < self.least_frames:
            raise VideoError(
                f"{self.name} needs {self.least_frames} frames, this video has {len(frames)}."
            )
        return to_pixels(frames).to(self.device)


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Return VBench's value of a data set from its videos' values and `Dimension.weight`."""
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
