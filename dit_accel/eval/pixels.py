"""Preparing frames for networks as VBench does: 8-bit pixels, resized without antialiasing.

Pixels are float ``[T, 3, H, W]`` between 0 and 255, RGB. A resize with antialiasing gives other
pixels wherever there is fine detail, and so other scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of each colour, of values in [0, 1]."""

Statistics = tuple[Sequence[float], Sequence[float]]


def to_pixels(frames: Tensor) -> Tensor:
    """Return frames in [0, 1] as whole numbers between 0 and 255, as a video file holds them."""
    return (frames.float().clamp(0, 1) * 255).round()


def resize_shorter(pixels: Tensor, side: int, mode: str, *, whole: bool = False) -> Tensor:
    """Resize so that the shorter side has ``side`` pixels, without antialiasing.

    Args:
        pixels: ``[T, 3, H, W]``.
        side: of the result; the longer side is rounded down.
        mode: "bilinear" or "bicubic".
        whole: clamp and round, as for 8-bit images; else bicubic overshoots beyond 0 and 255.
    """
    height, width = pixels.shape[-2:]
    if height <= width:
        size = (side, int(side * width / height))
    else:
        size = (int(side * height / width), side)
    return resize(pixels, size, mode, whole=whole)


def resize(pixels: Tensor, size: tuple[int, int], mode: str, *, whole: bool = False) -> Tensor:
    """Resize to (height, width) without antialiasing; see `resize_shorter`."""
    if size == tuple(pixels.shape[-2:]):
        return pixels
    resized = F.interpolate(pixels, size, mode=mode, align_corners=False, antialias=False)
    return resized.clamp(0, 255).round() if whole else resized


def centre_crop(pixels: Tensor, side: int) -> Tensor:
    """Cut the middle ``side x side`` pixels out of frames that are at least as large."""
    top, left = (round((size - side) / 2) for size in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


def normalise(pixels: Tensor, statistics: Statistics) -> Tensor:
    """Scale to [0, 1], take off the mean of each colour and divide by its deviation."""
    mean, deviation = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in statistics)
    return (pixels / 255 - mean) / deviation


def pad_to_multiple(pixels: Tensor, multiple: int) -> Tensor:
    """Repeat the border on both sides until height and width are multiples."""
    height, width = ((-size) % multiple for size in pixels.shape[-2:])
    sides = (width // 2, width - width // 2, height // 2, height - height // 2)
    return F.pad(pixels, sides, mode="replicate")


def crop_padding(padded: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad_to_multiple`."""
    top, left = (padded.shape[-2] - height) // 2, (padded.shape[-1] - width) // 2
    return padded[..., top : top + height, left : left + width]


def middle_indices(frames: int, count: int) -> list[int]:
    """Return the middle of each of ``count`` equal intervals; the last frame repeats if too few."""
    picked = min(frames, count)
    bounds = np.linspace(0, frames, picked + 1).astype(int).tolist()
    indices = [(low + high - 1) // 2 for low, high in pairwise(bounds)]
    return indices + indices[-1:] * (count - picked)
