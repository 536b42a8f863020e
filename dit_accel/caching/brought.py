"""Cache options that a model folder brings with it, beside its ``model_index.json``.

``caching.json`` holds options by method, as ``dit-accel calibrate`` writes them; ``profile.json``
is what ``dit-accel profile`` writes. diffusers ignores both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_accel.errors import OptionError

CALIBRATION_FILE, PROFILE_FILE = "caching.json", "profile.json"
_KNOWN_BY = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")


def brought_options(pipe: Any, method: str) -> dict[str, Any]:
    """Return the options of a cache that the folder of ``pipe`` brings; empty if none.

    Raises:
        OptionError: if the file is damaged, or was made for another model.
    """
    name = getattr(pipe, "config", {}).get("_name_or_path")
    if not name:
        return {}
    folder, found = Path(name), dict[str, Any]()
    if (folder / CALIBRATION_FILE).is_file():
        found |= read_calibration(folder / CALIBRATION_FILE, pipe).get(method, {})
    if method == "profiling_cache" and (folder / PROFILE_FILE).is_file():
        found["profile"] = str(folder / PROFILE_FILE)
    return found


def made_for(pipe: Any) -> dict[str, Any]:
    """Return what a calibration file knows its model by."""
    config = pipe.transformer.config
    return {name: config[name] for name in _KNOWN_BY if name in config}


def read_calibration(path: Path, pipe: Any) -> dict[str, dict[str, Any]]:
    """Return options by method from a calibration file; lists become tuples.

    Raises:
        OptionError: if it is no such file, or was made for another model than that of ``pipe``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        methods = content["options"].items()
        found = {name: {k: _tuples(v) for k, v in own.items()} for name, own in methods}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path} is no calibration, or is cut short: make it again with `dit-accel calibrate`."
        ) from error
    here = made_for(pipe)
    model = content.get("made_for", here)  # files once did not say
    if model != here:
        raise OptionError(
            f"{path} was made for a model of {model}, and this one has {here}: make its own with "
            "`dit-accel calibrate`."
        )
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
