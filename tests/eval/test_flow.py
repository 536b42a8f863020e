"""The classical flow finds known shifts, and nothing in noise; the fastest pixels are picked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.eval.dimensions.proxy_dynamic_degree import ProxyDynamicDegree
from dit_accel.eval.flow import fastest, lucas_kanade


def texture(height: int, width: int) -> Tensor:
    """Return a smooth random picture ``[1, 3, H, W]`` of 0 to 255."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=random)
    return 255 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(
    ("size", "shift"),
    [((97, 131), (0, 0)), ((97, 131), (2, -1)), ((128, 128), (-7, 5)), ((540, 620), (12, 9))],
)
def test_known_shifts(size, shift):
    right, down = shift
    picture = texture(size[0] + 32, size[1] + 32)
    first = picture[..., 16:-16, 16:-16]
    top, left = 16 - down, 16 - right
    second = picture[..., top : top + size[0], left : left + size[1]]
    flow = lucas_kanade(first, second)
    assert flow.shape == (1, 2, *size)
    inside = flow[0, :, 20:-20, 20:-20].flatten(1).median(1).values
    assert inside.tolist() == pytest.approx(shift, abs=0.15)


def test_no_texture_no_flow():
    grey = torch.full((1, 3, 64, 64), 90.0)
    assert lucas_kanade(grey, grey + 10).abs().max() < 1e-3


def test_the_fastest_pixels_are_picked():
    field = torch.zeros(1, 2, 16, 24)  # a frame of 15 x 20, padded
    field[0, 0].view(-1)[:19] = 3
    speed = fastest(lambda *_: field, torch.zeros(3, 15, 20), torch.zeros(3, 15, 20), share=0.05)
    assert speed == pytest.approx(3)  # int(16 * 24 * 0.05) = 19


def test_proxy_of_dynamic_degree_tells_motion_from_noise():
    picture = texture(96, 200)[0] / 255
    moving = torch.stack([picture[:, :, 6 * i : 6 * i + 96] for i in range(12)])
    noise = 0.02 * torch.randn(moving.shape, generator=torch.Generator().manual_seed(1))
    still = (picture[None, :, :, :96] + noise).clamp(0, 1)
    assert ProxyDynamicDegree().measure(moving, fps=8) == 1
    assert ProxyDynamicDegree().measure(still, fps=8) == 0
