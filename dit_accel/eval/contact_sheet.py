"""A picture of many generations, to be looked at: written as they come, and read back to go on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dit_accel.errors import OptionError
from dit_accel.files import replacing

FRAMES = 6  # of a video, side by side
SIDE = 96  # pixels of a frame
ROW = 2 * FRAMES  # frames in a row of the sheet: two videos or twelve images


class ContactSheet:
    """Rows of small pictures in order, at ``path``.

    Args:
        path: a .png.
        video: whether a generation is a video, of which `FRAMES` frames are shown.
        kept: how many generations an existing sheet already shows.

    Raises:
        OptionError: if there is no sheet at ``path`` that shows so many.
    """

    def __init__(self, path: Path, *, video: bool, kept: int = 0) -> None:
        self.path = path
        self.frames = FRAMES if video else 1
        self._tiles = list(self._read(kept * self.frames)) if kept else []

    def add(self, frames: Tensor) -> None:
        """Append a generation ``[T, 3, H, W]`` in [0, 1]; an image has T = 1."""
        picked = frames[torch.linspace(0, len(frames) - 1, self.frames).round().long()]
        small = F.interpolate(picked.float(), (SIDE, SIDE), mode="area").clamp(0, 1)
        self._tiles += list((small * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())

    def write(self) -> None:
        """Write all that was added, and what was read."""
        empty = np.zeros((SIDE, SIDE, 3), np.uint8)
        tiles = self._tiles + [empty] * (-len(self._tiles) % ROW)
        rows = [np.concatenate(tiles[i : i + ROW], axis=1) for i in range(0, len(tiles), ROW)]
        with replacing(self.path) as partial:
            Image.fromarray(np.concatenate(rows)).save(partial)

    def _read(self, count: int) -> np.ndarray:
        if self.path.is_file():
            pixels = np.asarray(Image.open(self.path).convert("RGB"))
            rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
            if columns == ROW and rows * columns >= count:
                tiles = pixels.reshape(rows, SIDE, ROW, SIDE, 3).swapaxes(1, 2)
                return tiles.reshape(-1, SIDE, SIDE, 3)[:count]
        raise OptionError(
            f"sheet {str(self.path)!r} lacks the pictures of prompts that the output already "
            "holds: give another output, or --force to start again."
        )
