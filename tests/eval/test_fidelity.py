"""Fidelity measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.errors import OptionError
from dit_accel.eval.fidelity import psnr


def test_psnr_of_a_known_error():
    frames = torch.full((2, 3, 4, 5), 0.5)
    assert psnr(frames, frames + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(frames, frames) == math.inf


def test_psnr_pools_the_squared_error_over_frames():
    frames = torch.zeros(2, 3, 8, 8)
    other = frames.clone()
    other[0] = 0.2
    assert psnr(frames, other) == pytest.approx(-10 * math.log10(0.04 / 2), abs=1e-4)


def test_psnr_refuses_other_shapes():
    with pytest.raises(OptionError, match="equal shapes"):
        psnr(torch.zeros(2, 3), torch.zeros(3, 2))
