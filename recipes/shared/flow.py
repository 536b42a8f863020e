"""Noise levels of flow matching, for training and for validation."""

import torch
from torch import Tensor

NOISE_LEVELS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.97)  # for validation


def noise_level(count: int, shift: float, device: str) -> Tensor:
    """Noise levels in (0, 1]: logit-normal, three in ten uniform, shifted towards noise."""
    u = torch.rand(count, device=device)
    bell = torch.sigmoid(torch.randn(count, device=device))
    u = torch.where(torch.rand(count, device=device) < 0.3, u, bell)
    return (shift * u / (1 + (shift - 1) * u)).clamp(1e-3, 1)
