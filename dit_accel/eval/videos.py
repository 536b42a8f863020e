"""Reading videos and pictures to be measured: every frame once, or a plain sentence why not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import VideoError

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
LEAST_WHOLE = 0.95  # share of the announced frames; sound may go on a little longer than they do


@dataclass(frozen=True)
class Video:
    """What a file shows.

    Attributes:
        frames: float32 ``[T, 3, H, W]`` in [0, 1], RGB; a picture has T = 1.
        fps: frames per second, on average; 1 for a picture.
    """

    frames: Tensor
    fps: float


def read_video(path: Path) -> Video:
    """Return every frame of a video as it was stored, none repeated or dropped, or of a picture.

    Raises:
        VideoError: if there is no such file, its suffix is unknown, it is empty, damaged or cut
            off, or shows nothing.
    """
    if not path.is_file():
        raise VideoError(f"{path}: there is no such file.")
    suffix = path.suffix.lower()
    if suffix not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
        known = ", ".join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        raise VideoError(f"{path}: {suffix or 'no suffix'} is none of {known}.")
    if not path.stat().st_size:
        raise VideoError(f"{path}: the file is empty.")
    frames, fps = _read_image(path) if suffix in IMAGE_SUFFIXES else _read_frames(path)
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    return Video(pixels.float() / 255, fps)


def _read_image(path: Path) -> tuple[list[np.ndarray], float]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return [np.asarray(image.convert("RGB"))], 1.0
    except (OSError, UnidentifiedImageError) as error:
        raise VideoError(f"{path}: {error}") from error


def _read_frames(path: Path) -> tuple[list[np.ndarray], float]:
    import imageio.v2 as imageio

    # Passing frames through keeps a changing frame rate from repeating some; a decoder that
    # stops at damage doesn't make up what is missing.
    options: dict[str, Any] = {
        "input_params": ["-xerror", "-err_detect", "explode"],
        "output_params": ["-fps_mode", "passthrough"],
    }
    try:
        opened: Any = imageio.get_reader(path, "ffmpeg", **options)
        with opened as reader:
            about = reader.get_meta_data()
            frames = [np.asarray(frame) for frame in reader.iter_data()]
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise VideoError(f"{path}: {_last_line(error)}") from error
    if not frames:
        raise VideoError(f"{path}: it has no frames.")
    fps, seconds = float(about.get("fps") or 0), float(about.get("duration") or 0)
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"{path}: its frame rate is {fps}.")
    announced = round(fps * seconds) if math.isfinite(seconds) else 0
    if len(frames) < LEAST_WHOLE * announced - 1:
        there = f"{len(frames)} of about {announced} frames are there"
        raise VideoError(f"{path}: it is damaged or cut off, {there}.")
    return frames, fps


def _last_line(error: Exception) -> str:
    """Return what ffmpeg says at the end of its long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
