"""What a video is worth by itself: VBench's dimensions, and proxies that need no download.

One file per dimension, each a formula with an injected backbone. Another package can bring
dimensions through the entry point group ``dit_accel.dimensions``.

VBench: Huang et al. 2024, arXiv 2311.17982.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from dit_accel.errors import BackboneError, OptionError, did_you_mean
from dit_accel.eval.backbones import Backbone
from dit_accel.eval.dimensions.base import Dimension
from dit_accel.registry import discover

NO_BACKBONES: Mapping[str, Backbone] = MappingProxyType({})


def list_dimensions() -> list[str]:
    """Return the names of all dimensions, sorted; those of proxies begin with ``proxy_``."""
    return sorted(_dimensions())


def dimension_class(name: str) -> type[Dimension]:
    """Return the dimension called ``name``.

    Raises:
        OptionError: if there is none; the message names the nearest.
    """
    found = _dimensions().get(name)
    if found is None:
        raise OptionError(f"unknown dimension {name!r}.{did_you_mean(name, _dimensions())}")
    return found


def make_dimension(name: str, **arguments: Any) -> Dimension:
    """Make the dimension called ``name``; see `Dimension` for the arguments.

    Raises:
        OptionError: if there is none; the message names the nearest.
    """
    return dimension_class(name)(**arguments)


def ready_dimensions(
    device: str | torch.device = "cpu", backbones: Mapping[str, Backbone] = NO_BACKBONES
) -> tuple[dict[str, Dimension], dict[str, str]]:
    """Return the dimensions that can be measured here without a download, and why others can't.

    Args:
        device: a torch device.
        backbones: networks by name, taken instead of `backbones.BACKBONES`'s own.
    """
    ready: dict[str, Dimension] = {}
    reasons = {}
    for name in list_dimensions():
        given = backbones.get(dimension_class(name).backbone_name or "")
        dimension = make_dimension(name, backbone=given, device=device, download=False)
        try:
            dimension.load()
            ready[name] = dimension
        except BackboneError as error:
            reasons[name] = str(error)
    return ready, reasons


@lru_cache(maxsize=1)
def _dimensions() -> Mapping[str, type[Dimension]]:
    return discover(__name__, Dimension, "dit_accel.dimensions")  # type: ignore[type-abstract]
