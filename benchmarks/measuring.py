"""What every benchmark here shares: where it ran, how it is timed, how it is written down."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def manifest(commit: str | None = None) -> dict[str, Any]:
    """Describe the machine and the software; ``commit`` is asked of git when None."""
    import triton

    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    gpu = _first_line("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _first_line("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpu_as_found": dict(zip(fields.split(","), gpu.split(", "), strict=False)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def median_ms(run: Callable[[], Any], repeats: int = 7, warmup: int = 2) -> float:
    """Median time of ``run`` on the GPU in milliseconds, by CUDA events.

    Without a GPU one run by the clock: enough to try a benchmark out.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    for _ in range(warmup):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def write_json(result: dict[str, Any], output: Path | None) -> None:
    """Print ``result`` and, if asked, write it to ``output``."""
    print(json.dumps(result, indent=1))
    save_json(result, output)


def save_json(result: dict[str, Any], output: Path | None) -> None:
    """Write ``result`` to ``output``, if there is one."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
