"""Keeps what ``dit-accel bench tune`` measured, in the user's cache folder: one file per card.

A file is used for the card, the release and the Triton that it was measured with. Otherwise the
built-in tables serve, and `Tuning.source` says why.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from dit_accel import __version__
from dit_accel.files import write_text
from dit_accel.kernels.tuning import HopperConfig, KernelConfig, Tuning

REMEDY = "run `dit-accel bench tune`"
_NUMBERS = {"block_m": (16, 256), "block_n": (16, 256), "num_warps": (1, 16), "num_stages": (1, 8),
            "stages": (2, 6), "eager": (0, 2)}  # fmt: skip
Config = TypeVar("Config", KernelConfig, HopperConfig)


@dataclass(frozen=True)
class Tunings:
    """What each device was tuned to, read once. Belongs to the operators of one acceleration."""

    read: dict[torch.device, Tuning] = field(default_factory=dict)

    def of(self, device: torch.device) -> Tuning:
        """Return the settings for ``device``."""
        if device not in self.read:
            self.read[device] = load_tuning(device)
        return self.read[device]


def cache_folder() -> Path | None:
    """Return the folder of what was measured, ``$XDG_CACHE_HOME/dit-accel`` on Linux."""
    if importlib.util.find_spec("platformdirs") is None:
        return None
    import platformdirs

    return platformdirs.user_cache_path("dit-accel", appauthor=False)


def tuning_path(gpu: str) -> Path | None:
    """Return the file for cards of this name; None where no cache folder can be found."""
    folder = cache_folder()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return None if folder is None else folder / f"tuning-{slug}.json"


def load_tuning(device: torch.device) -> Tuning:
    """Return the settings measured on this card; without any, why the built-in tables serve."""
    if device.type != "cuda":
        return Tuning()
    capability = torch.cuda.get_device_capability(device)
    table = "built-in table" + ("" if capability[0] == 9 else f", estimated for {capability}")
    path = tuning_path(torch.cuda.get_device_name(device))
    if path is None:
        return Tuning(f"{table}: the package platformdirs is not installed")
    if not path.exists():
        return Tuning(f"{table}: this card was not tuned; {REMEDY} to do so")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if differences := _differences(content, torch.cuda.get_device_name(device)):
            return Tuning(f"{table}: {path} is ignored, made with {differences}; {REMEDY} again")
        return _parse(content, f"measured on this card, {content['date'][:10]} ({path})")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return Tuning(f"{table}: {path} is ignored, it can't be read ({error}); {REMEDY} again")


def save_tuning(device: torch.device, tuning: Tuning) -> Path | None:
    """Write the settings of a card, and return where; None where no cache folder can be found."""
    gpu = torch.cuda.get_device_name(device)
    path = tuning_path(gpu)
    if path is None:
        return None
    content = {
        **_made_with(gpu),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "block_sparse": _write(tuning.block_sparse),
        "hopper": _write(tuning.hopper),
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def _made_with(gpu: str) -> dict[str, str]:
    return {"gpu": gpu, "dit_accel": __version__, "triton": _triton_version()}


def _triton_version() -> str:
    for package in ("triton", "pytorch-triton"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def _differences(content: Mapping[str, Any], gpu: str) -> str:
    """Say in what the file's card and versions are not the present ones."""
    return " and ".join(
        f"{name} {content.get(name)} (here: {here})"
        for name, here in _made_with(gpu).items()
        if content.get(name) != here
    )


def _write(entries: Mapping[tuple[int, Any], KernelConfig | HopperConfig]) -> dict[str, Any]:
    return {f"{head_size}.{kind}": asdict(config) for (head_size, kind), config in entries.items()}


def _parse(content: Mapping[str, Any], source: str) -> Tuning:
    block_sparse, hopper = {}, {}
    for key, entry in content["block_sparse"].items():
        head_size, itemsize = key.split(".")
        block_sparse[int(head_size), int(itemsize)] = _config(KernelConfig, entry)
    for key, entry in content["hopper"].items():
        head_size, kind = key.split(".")
        hopper[int(head_size), kind] = _config(HopperConfig, entry)
    return Tuning(source, block_sparse, hopper)


def _config(cls: type[Config], entry: Mapping[str, Any]) -> Config:
    """Check one entry: a damaged one must not reach a kernel."""
    if entry.keys() != {f.name for f in fields(cls)}:
        raise ValueError(f"unexpected settings {sorted(entry)}")
    for name, value in entry.items():
        least, most = _NUMBERS.get(name, (False, True))
        if type(value) is not type(least) or not least <= value <= most:
            raise ValueError(f"{name}={value!r}")
        if name.startswith("block_") and value & (value - 1):
            raise ValueError(f"{name}={value} is no power of two")
    return cls(**entry)
