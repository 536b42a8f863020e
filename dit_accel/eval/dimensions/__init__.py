"""What a video is worth by itself: VBench's dimensions, and proxies that need no download.

One file per dimension, each a formula with an injected backbone. Another package can bring
dimensions through the entry point group ``dit_accel.dimensions``.

VBench: Huang et al. 2024, arXiv 2311.17982.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dit_accel.errors import OptionError, did_you_mean
from dit_accel.eval.dimensions.base import Dimension
from dit_accel.registry import discover


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


@lru_cache(maxsize=1)
def _dimensions() -> Mapping[str, type[Dimension]]:
    return discover(__name__, Dimension, "dit_accel.dimensions")  # type: ignore[type-abstract]
