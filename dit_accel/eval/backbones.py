"""The networks behind the dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from dit_accel.errors import BackboneError

Backbone: TypeAlias = Callable[..., Any]


def load_backbone(name: str, device: str | torch.device = "cpu") -> Backbone:
    """Load the network called ``name``."""
    raise BackboneError(f"{name} can't be loaded yet.")
