"""Fidelity measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel.errors import OptionError
from dit_accel.eval.fidelity import psnr, relative_l1, ssim


def test_psnr_of_a_known_error():
    frames = torch.full((2, 3, 4, 5), 0.5)
    assert psnr(frames, frames + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(frames, frames) == math.inf


def test_psnr_pools_the_squared_error_over_frames():
    frames = torch.zeros(2, 3, 8, 8)
    other = frames.clone()
    other[0] = 0.2
    assert psnr(frames, other) == pytest.approx(-10 * math.log10(0.04 / 2), abs=1e-4)


def test_ssim_of_flat_frames():
    # Without structure only the means count: (2ab + c) / (a^2 + b^2 + c) with c = 0.01^2.
    frames = torch.full((2, 3, 16, 16), 0.5)
    expected = (2 * 0.5 * 0.4 + 1e-4) / (0.5**2 + 0.4**2 + 1e-4)
    assert ssim(frames, frames - 0.1) == pytest.approx(expected, abs=1e-4)
    assert ssim(frames, frames) == pytest.approx(1)


def test_relative_l1_of_a_known_error():
    latents = torch.tensor([[1.0, -3.0], [0.0, 4.0]])
    assert relative_l1(latents + 0.5, latents) == pytest.approx(2 / 8)
    assert relative_l1(latents, latents) == 0


@pytest.mark.parametrize("measure", [psnr, ssim, relative_l1])
def test_other_shapes_are_refused(measure):
    with pytest.raises(OptionError, match="equal shapes"):
        measure(torch.zeros(2, 3), torch.zeros(3, 2))
