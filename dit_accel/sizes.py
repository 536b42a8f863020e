"""Sizes in pixels: which of them a pipeline can make, and which suits its model."""

from __future__ import annotations

import inspect
from typing import Any

from dit_accel.errors import OptionError
from dit_accel.models import defaults_of


def pixels_per_token(pipe: Any) -> int | None:
    """Return the pixels along one side of a token, which sizes must be multiples of."""
    factor = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(
        pipe, "vae_scale_factor", None
    )
    if factor is None:
        return None
    patch = getattr(pipe.transformer.config, "patch_size", 2)
    # FLUX packs 2 x 2 latents into a token, though its patch size says 1.
    return int(factor * max(2, patch if isinstance(patch, int) else patch[-1]))


def check_size(pipe: Any, **sizes: int | None) -> None:
    """Refuse sizes that a pipeline would fail on, or silently round.

    Args:
        pipe: the pipeline.
        sizes: pixels by name, such as ``height=480``; None is not checked.

    Raises:
        OptionError: naming the nearest size that it can make, or the largest.
    """
    factor = pixels_per_token(pipe)
    positions = getattr(pipe.transformer.config, "pos_embed_max_size", None)
    for name, value in sizes.items():
        if factor is None or value is None:
            continue
        if positions is not None and value > positions * factor:
            raise OptionError(
                f"{name}={value} is more than the {positions * factor} that "
                f"{type(pipe.transformer).__name__} has positions for."
            )
        if value % factor:
            near = max(factor, round(value / factor) * factor)
            raise OptionError(
                f"{name}={value} is not a multiple of {factor}, as {type(pipe).__name__} "
                f"needs: take {near}."
            )


def usual_size(pipe: Any) -> tuple[int, int] | None:
    """Return the height and width that a pipeline makes if not told, as far as it says."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    sizes = tuple(parameters[name].default for name in ("height", "width") if name in parameters)
    if len(sizes) == 2 and all(isinstance(size, int) for size in sizes):
        return sizes
    latents = getattr(pipe, "default_sample_size", None)
    if latents is None:
        return None
    return (latents * pipe.vae_scale_factor,) * 2


def trained_size(pipe: Any) -> tuple[int, int] | None:
    """Return the height and width that a model's folder recommends, or its pipeline's usual."""
    defaults = defaults_of(pipe)
    if defaults.height is not None and defaults.width is not None:
        return defaults.height, defaults.width
    return usual_size(pipe)
