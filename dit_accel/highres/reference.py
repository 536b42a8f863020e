"""FreeSwim's formulas (arXiv 2511.14712), written out: read this first.

A model that was trained on a grid of ``(h, w)`` tokens per frame draws a larger one in two stages:
it generates at its own size; the result is enlarged, mixed with noise (`renoised`) and denoised at
the target. There, self-attention is a window as large as the grid of the training
(`inward_window`), its logits a little steeper (`length_gain`). A second pass through the same
blocks sees everything, and what its tokens read from the text replaces what the first pass's read:
details come from windows, and what stands where from the whole picture.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Parity = Literal["released", "native"]


def window_tokens(trained: int, parity: Parity) -> int:
    """Return the window on one axis for a model trained on so many tokens.

    "released" is the odd size of the released code, ``2 * (trained // 2) + 1``; "native" exactly
    the size of the training.
    """
    return 2 * (trained // 2) + 1 if parity == "released" else trained


def window_start(size: int, window: int) -> Tensor:
    """Return the first key that each of ``size`` queries on an axis sees, int64 ``[size]``.

    The window is centred on the query and slides inward at the borders; it is never cut.
    """
    return (torch.arange(size) - window // 2).clamp(0, size - window)


def inward_window(grid: tuple[int, int, int], window: tuple[int, int]) -> Tensor:
    """Return bool ``[N, N]``: which key (column) a query (row) sees; raster order, all frames."""
    frames, *sides = grid
    on_axes = []
    for size, width in zip(sides, window, strict=True):
        start = window_start(size, width)[:, None]
        key = torch.arange(size)
        on_axes.append((start <= key) & (key < start + width))
    plane = torch.einsum("ab,cd->acbd", *(axis.double() for axis in on_axes)).flatten(0, 1)
    return plane.flatten(1).bool().repeat(frames, frames)


def length_gain(tokens: int) -> float:
    """Return the factor on the logits for a model trained on so many tokens per frame.

    ``sqrt(log_n(2 n))``: 1.0461 for the 30 x 52 tokens of 480 x 832 pixels.
    """
    return math.sqrt(math.log(2 * tokens) / math.log(tokens)) if tokens > 1 else 1.0


def renoised(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return latents with so much noise in them: ``(1 - sigma) * latents + sigma * noise``."""
    return (1 - sigma) * latents + sigma * noise
