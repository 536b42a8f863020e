"""Keeps what probes of caches measured, in the user's cache folder, so that each runs only once.

A file is for one set of circumstances: the release, the model and its weights, the methods with
their options, and what was generated. Where these can't be written down (an image among the inputs,
weights that lie on no device), nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_accel import __version__
from dit_accel.composition import MethodChoice, members
from dit_accel.files import write_text
from dit_accel.tuning_file import cache_folder

Row = dict[str, Any]


def circumstances(
    pipe: Any, method: MethodChoice, options: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]
) -> Row | None:
    """Return what a probe's results depend on, JSON-ready; None if that can't be written down."""
    found: Row = {
        "dit_accel": __version__,
        "pipeline": type(pipe).__name__,
        "weights": [
            fingerprint(getattr(pipe, name, None)) for name in ("transformer", "transformer_2")
        ],
        "scheduler": dict(getattr(pipe.scheduler, "config", {})),
        "method": members(method),
        "options": dict(options),
        "profile": _text_of(options.get("profile")),
        "calls": [dict(call) for call in calls],
    }
    if "unknown" in found["weights"]:
        return None
    try:
        same: Row = json.loads(json.dumps(found))
    except (TypeError, ValueError):
        return None
    return same


def fingerprint(transformer: Any) -> str:
    """Return a short text that differs between weights; "" for no transformer.

    Looks at the first and the last parameters, so that adapters and fused ones show too.
    """
    if transformer is None:
        return ""
    named = sorted(transformer.named_parameters())
    sums = []
    for name, parameter in named[:8] + named[-8:]:
        if parameter.is_meta:
            return "unknown"
        with torch.no_grad():
            total = float(parameter.detach().double().abs().sum())
        sums.append(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total:.6g}")
    text = "\n".join([type(transformer).__name__, str(len(named)), *sums])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_points(where: Row | None) -> list[Row]:
    """Return the points that were measured under these circumstances; none if damaged."""
    path = _path(where)
    if path is None or not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["circumstances"] != where:
            return []
        names = ("strength", "speedup", "error")
        points = [{name: point[name] for name in names} for point in content["points"]]
        return points if all(isinstance(v, int | float) for p in points for v in p.values()) else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def save_points(where: Row | None, points: Sequence[Row]) -> None:
    """Keep points, if their circumstances and a place for them are known."""
    path = _path(where)
    if path is not None and points:
        content = {"circumstances": where, "points": list(points)}
        write_text(path, json.dumps(content, indent=1) + "\n")


def _text_of(path: Any) -> str | None:
    """Return what stands in a file that an option names; None if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (TypeError, OSError):
        return None


def _path(where: Row | None) -> Path | None:
    folder = cache_folder()
    if where is None or folder is None:
        return None
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "calibrations" / f"{digest}.json"
