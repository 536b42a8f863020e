"""What a video is worth by itself: VBench's dimensions, and proxies that need no download.

One file per dimension, each a formula with an injected backbone. Another package can bring
dimensions through the entry point group ``dit_accel.dimensions``.

VBench: Huang et al. 2024, arXiv 2311.17982.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

import torch

from dit_accel.errors import BackboneError, OptionError, did_you_mean
from dit_accel.eval.backbones import Backbone, load_backbone
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


def load_dimensions(
    names: Sequence[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    backbones: Mapping[str, Backbone] = NO_BACKBONES,
) -> tuple[dict[str, Dimension], dict[str, str]]:
    """Return dimensions by name with their networks, each of which is loaded once.

    Args:
        names: which; None takes all that can be measured here without a download.
        device: a torch device.
        backbones: networks by name, taken instead of those of `backbones.BACKBONES`.

    Returns:
        The dimensions, and by name why others were left out.

    Raises:
        OptionError: if a name is unknown.
        BackboneError: if the network of a dimension in ``names`` can't be loaded.
    """
    networks = dict(backbones)
    made: dict[str, Dimension] = {}
    reasons: dict[str, str] = {}
    chosen = list_dimensions() if names is None else names
    for cls in [dimension_class(name) for name in chosen]:
        needed = cls.backbone_name
        try:
            if needed is not None and needed not in networks:
                networks[needed] = load_backbone(needed, device, download=names is not None)
        except BackboneError as error:
            if names is not None:
                raise
            reasons[cls.name] = str(error)
            continue
        made[cls.name] = cls(networks.get(needed or ""), device=device)
    return made, reasons


@lru_cache(maxsize=1)
def _dimensions() -> Mapping[str, type[Dimension]]:
    return discover(__name__, Dimension, "dit_accel.dimensions")  # type: ignore[type-abstract]
