"""Putting methods on pipelines that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from dit_accel.acceleration import accelerate_pipeline
from dit_accel.bench.measuring import Row
from dit_accel.errors import DensityUnreachableError
from dit_accel.registry import list_methods, method_class

_BLOCKS = ("block_size", "query_block", "key_block")


def block_options(method: str, size: int | None) -> dict[str, int]:
    """Return the options that give an attention method blocks of ``size`` tokens; none for None."""
    if size is None or method not in list_methods("attention"):
        return {}
    own = {f.name for f in fields(method_class(method)) if f.init}
    return {name: size for name in _BLOCKS if name in own}


def accelerate_at(
    pipe: Any, method: str | list[str], run: Callable[[], Any], **settings: Any
) -> Row:
    """Accelerate ``pipe`` and ``run`` it, at the density asked for or the least within reach.

    Without the quality guard: a method is timed, and with random weights it is far from dense.

    Returns:
        ``{"reaches": least}`` if the density asked for was out of reach, and nothing otherwise.
    """
    try:
        accelerate_pipeline(pipe, method, **{"guard": False, **settings})
        run()
    except DensityUnreachableError as error:
        least = {"guard": False, **settings, "density": error.least}
        accelerate_pipeline(pipe, method, **least)
        run()
        return {"reaches": error.least}
    return {}
