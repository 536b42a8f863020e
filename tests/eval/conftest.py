"""The golden values of VBench's formulas and of fidelity, and the clips that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "vectors/vbench_golden.json"
    return json.loads(path.read_text())


def golden_pixels() -> tuple[Tensor, Tensor]:
    """Return the golden clip and its disturbed copy, ``[T, H, W, 3]`` of 0 to 255."""
    t, y, x, c = torch.meshgrid(*(torch.arange(n) for n in (9, 24, 40, 3)), indexing="ij")
    clip = (7 * t + 3 * y + 5 * x + 11 * c + t * t * (x % 5) + (y * x) // 7) % 256
    disturbed = clip + ((3 * t + x + 2 * y + c) % 9 - 4) * (1 + t // 3)
    return clip, disturbed.clamp(0, 255)


def as_frames(pixels: Tensor) -> Tensor:
    """Return frames ``[T, 3, H, W]`` in [0, 1]."""
    return pixels.permute(0, 3, 1, 2).double() / 255


@pytest.fixture
def clip() -> Tensor:
    return as_frames(golden_pixels()[0])


@pytest.fixture
def disturbed() -> Tensor:
    return as_frames(golden_pixels()[1])
