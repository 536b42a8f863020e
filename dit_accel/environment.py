"""Where this process runs: devices to pick from, and what a measurement has to say about itself."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dit_accel.compat import active_backend
from dit_accel.errors import OptionError

PACKAGES = ("dit-accel", "torch", "triton", "diffusers", "transformers", "accelerate")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the versions, the device, the dense baseline and, in a checkout, the commit."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": describe_device(device),
        "dense_backend": f"diffusers: {active_backend()}",
        "commit": _commit(),
    }


def describe_device(device: str) -> dict[str, Any]:
    """Return name, memory and library versions of a torch device."""
    import torch

    if torch.device(device).type != "cuda":
        return {
            "type": torch.device(device).type,
            "name": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(torch.device(device))
    return {
        "type": "cuda",
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def pick_device(name: str = "auto") -> str:
    """Return the torch device called ``name``; "auto" takes a GPU if there is one.

    Raises:
        OptionError: if there is no such device here.
    """
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    apple = ["mps"] if torch.backends.mps.is_available() else []
    available = [*(["cuda"] if gpus else []), *apple, "cpu", *gpus]
    if name == "auto":
        return available[0]
    if name not in available:
        raise OptionError(f"no device {name!r} here: there is {', '.join(available)}.")
    return name


def ffmpeg_version() -> str | None:
    """Return the version of the ffmpeg that videos are written with, or None."""
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_version())
    except RuntimeError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this file is tracked in, marked if it is dirty."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside somebody else's repository: ask about this very file.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
