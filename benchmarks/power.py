"""What limits attention kernels under steady load: the clock and the power that they run at.

    python benchmarks/power.py --output benchmarks/results/power-h100.json

Each kernel runs without a pause for some seconds while ``nvidia-smi`` reads the clock of the
multiprocessors, the power and whether the power limit slows them down. A row has the sustained rate
on attended pairs, the cycles that the tensor cores are busy at that clock (4,096 operations a cycle
and multiprocessor in 16 bits on Hopper), and the energy of a TFLOP. A kernel that is slowed by the
power limit gains from less work, not from shorter waits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dit_accel.bench.cases import make_case
from dit_accel.bench.contenders import cudnn_dense
from dit_accel.bench.measuring import manifest, write_json
from dit_accel.operators import make_operators

TOKENS, HEADS = 75_600, 8
CASES = [(128, 0.25), (128, 0.1), (64, 0.25)]
OPERATORS = ("hopper", "flash-attn-4", "triton")
PER_CYCLE = 4_096
"""Floating-point operations of a Hopper multiprocessor's tensor cores in a cycle, 16 bits."""
QUERY = "clocks.sm,power.draw.instant,clocks_event_reasons.sw_power_cap"
Row = dict[str, Any]


def readings(path: Path) -> list[tuple[float, float, bool]]:
    """Return clock in MHz, power in W, and whether power slows the clock, from a log."""
    found = []
    for line in path.read_text().splitlines():
        if line.count(",") != 2:
            continue  # the last line may be cut
        clock, power, capped = (part.strip() for part in line.split(","))
        found.append((float(clock), float(power), capped == "Active"))
    return found


def under_load(run: Callable[[], Any], seconds: float) -> Row:
    """Run without a pause; the first half is warming up."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds / 2:
        for _ in range(20):
            run()
        torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "readings"
        reader = subprocess.Popen(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms", "50",
             "--id=0", f"--filename={log}"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        count, began = 0, time.perf_counter()
        start.record()
        while time.perf_counter() - began < seconds / 2:
            for _ in range(20):
                run()
            count += 20
            # Queued work must not outlive the time by much.
            end.record()
            end.synchronize()
        reader.terminate()
        reader.wait()
        found = readings(log)
    return {
        "ms": round(start.elapsed_time(end) / count, 4),
        "mhz": median(clock for clock, _, _ in found),
        "watts": round(median(power for _, power, _ in found), 1),
        "slowed_by_power": round(sum(capped for _, _, capped in found) / len(found), 2),
        "readings": len(found),
    }


def measure(seconds: float) -> Iterator[Row]:
    """Yield a row for each case and kernel; a peer that can't run is left out."""
    units = torch.cuda.get_device_properties(0).multi_processor_count
    for head_size, density in CASES:
        case = make_case(TOKENS, HEADS, head_size, density)
        runs: dict[str, Callable[[], Any]] = {"cudnn dense": partial(cudnn_dense, *case.qkv)}
        for name in OPERATORS:
            operator = make_operators()[name]
            if operator.unavailable is None and operator.why_not(case.plan, case.qkv[0]) is None:
                runs[name] = partial(operator.run, *case.qkv, case.plan, None, False)
        for name, run in runs.items():
            row = under_load(run, seconds)
            pairs = HEADS * TOKENS**2 if name == "cudnn dense" else case.pairs()
            tflop = 4 * pairs * head_size / 1e12
            row |= {
                "tflops": round(tflop / row["ms"] * 1e3, 1),
                "busy": round(tflop * 1e15 / row["ms"] / (row["mhz"] * 1e6 * units * PER_CYCLE), 3),
                "joule_per_tflop": round(row["watts"] * row["ms"] / 1e3 / tflop, 4),
            }
            yield {"head_size": head_size, "density": density, "kernel": name} | row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each kernel")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("the rates per cycle are those of a Hopper GPU")
    rows: list[Row] = []
    result = {"manifest": manifest(args.commit), "rows": rows}
    for row in measure(args.seconds):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_json(result, args.output)


if __name__ == "__main__":
    main()
