"""LPIPS, the learned distance of pictures, from torchmetrics and torchvision where installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from dit_accel.errors import BackboneError

Lpips: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The distance of two pictures ``[1, 3, H, W]``, RGB in [-1, 1]."""

_WEIGHTS = {"alex": "alexnet-", "vgg": "vgg16-", "squeeze": "squeezenet1_1-"}


def installed_lpips(net: str = "alex", device: str | torch.device = "cpu") -> Lpips | None:
    """Return `load_lpips`'s distance, or None if that would need a package or a download."""
    if find_spec("torchmetrics") is None or find_spec("torchvision") is None:
        return None
    if not any(Path(torch.hub.get_dir(), "checkpoints").glob(f"{_WEIGHTS[net]}*.pth")):
        return None
    return load_lpips(net, device)


def load_lpips(net: str = "alex", device: str | torch.device = "cpu") -> Lpips:
    """Return the distance of Zhang et al. 2018 (arXiv 1801.03924), version 0.1.

    Args:
        net: "alex", "vgg" or "squeeze"; the first use downloads its weights.
        device: where it runs, wherever the pictures are.

    Raises:
        BackboneError: if torchmetrics or torchvision is missing, or the weights can't be had.
    """
    try:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        model = LearnedPerceptualImagePatchSimilarity(net_type=net).to(device)  # type: ignore[arg-type]
    except (ImportError, OSError, RuntimeError) as error:
        raise BackboneError(
            f"LPIPS ({net}) can't be loaded: {error} It needs torchmetrics and torchvision "
            "(pip install 'dit-accel[eval]' torchvision), whose weights are downloaded once."
        ) from error

    def distance(first: Tensor, second: Tensor) -> Tensor:
        with torch.no_grad():
            return model(first.to(device), second.to(device))

    return distance
