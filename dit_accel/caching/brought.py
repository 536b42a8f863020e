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


def brought_options(pipe: Any, method: str) -> dict[str, Any]:
    """Return the options of a cache that the folder of ``pipe`` brings; empty if none.

    Raises:
        OptionError: if the file is damaged.
    """
    name = getattr(pipe, "config", {}).get("_name_or_path")
    if not name:
        return {}
    folder, found = Path(name), dict[str, Any]()
    if (folder / CALIBRATION_FILE).is_file():
        found |= read_calibration(folder / CALIBRATION_FILE).get(method, {})
    if method == "profiling_cache" and (folder / PROFILE_FILE).is_file():
        found["profile"] = str(folder / PROFILE_FILE)
    return found


def read_calibration(path: Path) -> dict[str, dict[str, Any]]:
    """Return options by method from a calibration file; lists become tuples.

    Raises:
        OptionError: if it is no such file.
    """
    try:
        methods = json.loads(path.read_text(encoding="utf-8"))["options"]
        return {name: {k: _tuples(v) for k, v in own.items()} for name, own in methods.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path} is no calibration, or is cut short: make it again with `dit-accel calibrate`."
        ) from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
