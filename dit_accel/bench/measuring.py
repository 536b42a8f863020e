"""What every benchmark shares: where it ran, how it is timed, and what becomes of failures."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dit_accel.environment import environment
from dit_accel.errors import DitAccelError
from dit_accel.files import write_text

Row = dict[str, Any]
SEED = 0
PEERS = ("diffusers", "flash-attn-4", "sageattention", "natten")
_GPU = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def manifest(commit: str | None = None, **more: Any) -> Row:
    """Describe the machine and the software; ``commit`` is asked of git when None."""
    gpu = _first_line("nvidia-smi", f"--query-gpu={_GPU}", "--format=csv,noheader")
    return {
        "date": now(),
        "commit": commit or environment()["commit"] or "unknown",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpu_as_found": dict(zip(_GPU.split(","), gpu.split(", "), strict=False)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "peers": {name: _version(name) for name in PEERS},
        "seed": SEED,
        **more,
    }


def now() -> str:
    """Return date and time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def median_ms(
    run: Callable[[], Any], repeats: int = 7, warmup: int = 2, device: str | None = None
) -> float:
    """Median time of ``run`` in milliseconds; see `alternating_ms`."""
    return alternating_ms([run], repeats, warmup, device)[0]


def alternating_ms(
    runs: Sequence[Callable[[], Any]],
    repeats: int = 7,
    warmup: int = 2,
    device: str | None = None,
) -> list[float]:
    """Median times in milliseconds of several runs that take turns, so that all get equally hot.

    On a GPU by CUDA events. Elsewhere one run each by the clock: enough to try a benchmark out.

    Args:
        runs: what to time.
        repeats: timed rounds.
        warmup: rounds before.
        device: "cuda" or "cpu"; None takes a GPU if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type != "cuda":
        return [_clocked_ms(run) for run in runs]
    for _ in range(warmup):
        for run in runs:
            run()
    events: list[list[tuple[Any, Any]]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, of_run in zip(runs, events, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            of_run.append((start, stop))
    torch.cuda.synchronize()
    return [statistics.median(a.elapsed_time(b) for a, b in of_run) for of_run in events]


def _clocked_ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def guarded(measure: Callable[[Mapping[str, Any]], Row], task: Mapping[str, Any]) -> Row:
    """Return what ``measure`` returns, or why it could not: one failure must not cost the run.

    "refused" is an answer of dit-accel or of a peer that can't run the task, "failed" anything
    else; ``out_of_memory`` marks the failures that a smaller task would not have.
    """
    try:
        return measure(task)
    except DitAccelError as error:
        return {"refused": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:500]}"
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if full or "can't allocate memory" in reason:
            row: Row = {"failed": f"out of memory: {reason}", "out_of_memory": True}
        elif type(error).__name__ == "OutOfResources":  # of Triton: too large for this chip
            row = {"failed": reason}
        else:
            row = {"failed": reason, "trace": traceback.format_exc()[-1000:]}
    # Only now: the exception held on to the tensors of the frames that it went through.
    free_memory()
    return row


def free_memory() -> None:
    """Give unused memory back."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def write_json(result: Mapping[str, Any], output: Path | None) -> None:
    """Write ``result``, if there is somewhere to."""
    if output is not None:
        write_text(output, json.dumps(result, indent=1, allow_nan=False) + "\n")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split("\n")[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
